"""Dependencies point down: the order of the rooms, and what some of them must not know of."""

import re

import pytest
from import_graph import circles, import_graph, reachable, rooms
from paths import ROOT

ORDER = (
    ("fp8", "linear", "options", "startup", "text", "threads", "time_limit", "version"),
    ("errors", "experts"),
    ("lut_format",),
    ("kernels", "operations"),
    ("devices",),
    ("encoding",),
    ("checkpoint", "quantization", "samples"),
    ("codebooks", "sources", "targets"),
    ("conversion", "verification", "hub", "vllm_plugin"),
    ("calibration", "cluster", "distillation", "regression", "report"),
    ("evaluation",),
    ("api",),
    ("cli", "convert_w4a8"),
    ("__main__",),
)
"""From the ground up. Rooms of one floor do not know of each other."""
FLOOR = {room: floor for floor, names in enumerate(ORDER) for room in names}
MODULES = import_graph(ROOT)
ROOMS = rooms(MODULES)
CHOOSERS = {"layer", "scale_search", "envelope", "codes", "groups"}
"""Modules of `quantization` that choose numbers."""


def test_no_file_and_no_room_is_in_a_circle() -> None:
    """Nothing imports itself by way of others."""
    assert circles(MODULES) == []
    assert circles(ROOMS) == []


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_what_lies_below_them(room: str) -> None:
    """Every room has its floor; what it imports lies on a lower one."""
    if room == "convert_w4a8":  # the package itself loads public names on demand
        return
    assert {other: FLOOR[other] for other in ROOMS[room] if FLOOR[other] >= FLOOR[room]} == {}


def test_the_proof_shares_nothing_with_what_it_proves() -> None:
    """Verification imports, by whatever way, nothing that chooses numbers and nothing that writes."""
    seen = set().union(*(reachable(MODULES, name) for name in MODULES if name.startswith("verification.")))
    assert {f"quantization.{name}" for name in CHOOSERS} <= MODULES.keys()
    assert seen & {f"quantization.{name}" for name in CHOOSERS} == set()
    assert {
        name for name in seen if name.partition(".")[0] in ("codebooks", "conversion", "report", "cli", "hub")
    } == set()
    assert seen & {"checkpoint.writer", "checkpoint.shards", "checkpoint.journal"} == set()


def test_the_proof_reads_with_the_safetensors_library() -> None:
    """Neither checkpoint is read by the converter's own reader there."""
    for path in (ROOT / "convert_w4a8" / "verification").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "read_tensor" not in text
        assert "read_into" not in text


def test_input_and_output_formats_do_not_know_each_other() -> None:
    """They meet in `linear`."""
    for name, imported in MODULES.items():
        room = name.partition(".")[0]
        others = {"sources": "targets", "targets": "sources"}.get(room)
        assert not [target for target in imported if target.partition(".")[0] == others], name


def test_nothing_knows_which_formats_there_are() -> None:
    """A new format is one file: no module imports a format, but by way of the folder that lists them."""
    formats = {name for name in MODULES if name.partition(".")[0] in ("sources", "targets")}
    shared = ("base", "carried", "checks", "config_groups", "ct_settings", "fused_experts", "patterns", "settings")
    formats -= {"sources", "targets", "targets.base", "targets.pack_quantized", *(f"sources.{name}" for name in shared)}
    assert formats
    imports = {name: imported & formats for name, imported in MODULES.items() if imported & formats}
    assert imports == {"sources.auto_round": {"sources.awq", "sources.gptq"}}  # whose tensors are those of the two
    names = ("awq", "gptq", "compressed-tensors", "lut")
    for path in (ROOT / "convert_w4a8").rglob("*.py"):
        room = path.relative_to(ROOT / "convert_w4a8").parts[0]
        if room not in ("sources", "targets"):
            text = path.read_text(encoding="utf-8")
            found = [name for name in names if f'== "{name}"' in text or f'!= "{name}"' in text]
            assert found == [], path


def test_the_plugin_imports_no_converter() -> None:
    """What vLLM loads needs the format, the layers and the tables, and no reader, planner or writer of checkpoints."""
    seen = set().union(*(reachable(MODULES, name) for name in MODULES if name.startswith("vllm_plugin")))
    allowed = {"devices", "encoding", "errors", "fp8", "kernels", "linear", "lut_format", "operations", "text"}
    allowed |= {"version", "vllm_plugin"}
    assert {name.partition(".")[0] for name in seen} <= allowed


def test_one_room_knows_of_ray() -> None:
    """Everybody else gets what carries out its tasks handed over."""
    rooms_with_ray = {
        path.relative_to(ROOT / "convert_w4a8").parts[0]
        for path in (ROOT / "convert_w4a8").rglob("*.py")
        if re.search(r"^\s*(import ray|from ray)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert rooms_with_ray == {"cluster"}


def test_nothing_imports_the_command_line() -> None:
    """It is the top."""
    above = {name for name, imported in ROOMS.items() if "cli" in imported}
    assert above == {"__main__"}
