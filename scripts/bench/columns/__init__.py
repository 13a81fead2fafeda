"""The columns of the tables of the documents: a module for each document, of its name."""

Columns = tuple[tuple[str, str], ...]
"""Heading and contents: a template of `str.format` over the keys of a row. Formats beside Python's are `~`, three
digits or so, and `~%`, the same in percent. A cell is empty where the row lacks a key. Text stands as it is, also
where a number is expected: a range, or fewer digits than the format would print."""
