"""What may be replaced by an output, and who may read it."""

import stat
from pathlib import Path

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.files import CARD, CONFIG, INDEX, needs_index
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.shards import ShardWriter
from convert_w4a8.checkpoint.writer import Privacy
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.errors import ConvertError, W4A8Error
from convert_w4a8.sources.carried import carried_groups, find_by_groups
from convert_w4a8.targets import find_target
from convert_w4a8.targets.base import make_block


def check_replaceable(out: Path, source: Checkpoint) -> None:
    """Check that a directory is absent, empty, or an output of a conversion and nothing else.

    Raises:
        ConvertError: it holds what no conversion wrote, and `--overwrite` would delete it.

    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    remedy = "remove it yourself, or choose another output path"
    try:
        found = open_checkpoint(out)
        target = find_target(found)
        block = found.quantization_config
        carried = carried_groups(find_by_groups(found, block.get("carried") or block, []), {})
        mixture = Mixture(tuple(target.find_layers(found)), carried)
        ignore = block.get("ignore")
        entries = [str(entry) for entry in ignore] if isinstance(ignore, list) else []
        ours = make_block(target, block, entries, target.stored_mode(found), {}, mixture)
    except W4A8Error:
        raise ConvertError(str(out), "is not an output of w4a8-convert, and is not replaced", remedy) from None
    is_ours = all(block.get(key) == value for key, value in ours.items() if key not in ("ignore", "conversion"))
    if not is_ours or (target.SCHEME == "W4A16" and not _says_whose_it_is(out)):  # others write the same, too
        raise ConvertError(str(out), "is not an output of w4a8-convert, and is not replaced", remedy)
    known = {CONFIG, CARD, INDEX, *map(str, source.side_files)}
    known |= {str(info.path.relative_to(out)) for info in found.tensors.values()}
    for path in sorted(out.rglob("*")):
        relative = path.relative_to(out)
        if (path.is_symlink() or not path.is_dir()) and str(relative) not in known:
            raise ConvertError(str(path), "is not of a conversion, and would be deleted", "move it elsewhere")


def _says_whose_it_is(out: Path) -> bool:
    """Whether the model card of a checkpoint says that it was made here."""
    try:
        with (out / CARD).open(encoding="utf-8", errors="replace") as file:
            return " by w4a8-convert " in file.read(1 << 16)
    except OSError:
        return False


def privacy(source: Checkpoint) -> Privacy:
    """Return who may read an output: nobody who may not read the source's directory, or one of its weights."""
    weights = 0o777
    for path in {info.path for info in source.tensors.values()}:
        weights &= path.stat().st_mode
    owner = stat.S_IRUSR | stat.S_IWUSR
    return Privacy(
        directories=stat.S_IMODE(source.root.stat().st_mode) | stat.S_IRWXU,
        weights=weights | owner,
        files=stat.S_IMODE((source.root / CONFIG).stat().st_mode) | owner,
    )


def is_finished(out: Path, source: Checkpoint, plan: Plan) -> bool:
    """Whether a directory is what carrying out a plan gives, by its configuration and the names and sizes of its files.

    What its tensors hold is not looked at; `verification` does that.
    """
    try:
        if work_path(out.resolve()).exists() or not out.is_dir() or not any(out.iterdir()):
            return False
    except (OSError, RuntimeError):  # links in a circle, a directory that cannot be read: the conversion says so
        return False
    try:
        check_replaceable(out, source)
        found = open_checkpoint(out)
    except W4A8Error:
        return False
    block = found.quantization_config
    conversion = block.get("conversion")
    if isinstance(conversion, dict) and conversion.get("scales") != str(plan.options.scales):
        return False
    expected = make_block(
        plan.target, source.quantization_config, plan.ignore, plan.options.scales, {}, plan.mixture(source.config)
    )
    if any(block.get(key) != value for key, value in expected.items() if key != "conversion"):
        return False
    sizes = {out / shard.file_name: ShardWriter(out, shard).size for shard in plan.shards}
    if any(map(needs_index, source.side_files)) and not (out / INDEX).is_file():
        return False
    sizes |= {out / relative: (source.root / relative).stat().st_size for relative in source.side_files}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
