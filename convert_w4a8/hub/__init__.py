"""The Hugging Face Hub: ids to directories, outputs to repositories, parts of files."""
