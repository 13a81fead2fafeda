"""Verification by units: in parts, in any processes, it is the same as in one."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoint_edits import edit_tensors, write_case
from ray_nodes import Nodes, digests
from tiny_models import write_llama

from convert_w4a8 import api
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.cluster import connection
from convert_w4a8.cluster.nodes import Cluster
from convert_w4a8.cluster.proof import cut
from convert_w4a8.options import Options
from convert_w4a8.verification.proof import Proof, verify

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint and its conversion, which is damaged."""
    root = tmp_path_factory.mktemp("pair")
    source = write_case("gptq-v1", root / "in").path
    api.convert(source, root / "out", Options(), device="cpu")
    edit_tensors(root / "out", lambda tensors: tensors.update(extra=tensors["model.norm.weight"].clone()))
    edit_tensors(root / "out", lambda tensors: tensors["model.norm.weight"].fill_(1))
    return source, root / "out"


@pytest.mark.parametrize("nbytes", [1, 10_000, 10**9])
def test_parts_make_the_whole(nbytes: int, pair: tuple[Path, Path]) -> None:
    """Of any size: the same checks and problems, in the same order."""
    source, out = (open_checkpoint(path) for path in pair)
    proof = Proof(out, source)
    parts = list(cut(proof.sizes, nbytes))
    assert [unit for start, stop in parts for unit in range(start, stop)] == list(range(len(proof.sizes)))
    assert sum(proof.sizes) == source.nbytes
    found = proof.verdict([Proof(out, source).check(part) for part in parts])
    assert found == verify(out, source)
    assert {problem.subject for problem in found.problems} == {"extra", "model.norm.weight"}


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_functions_on_a_cluster(
    nodes: Nodes, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` and `check` find what they find here; `quantize` without data gives the same bytes."""
    monkeypatch.setattr(connection, "connect", lambda _address: nullcontext(Cluster(nodes.ray)))
    source, out = pair
    seen: list[int] = []
    assert api.verify(out, source, ray="auto", progress=seen.append) == api.verify(out, source)
    assert sum(seen) == open_checkpoint(source).nbytes
    monkeypatch.chdir(source.parent)
    assert api.check("in", ray="auto", device="cpu") == api.check("in", device="cpu")
    (tmp_path / "model").mkdir()
    model = write_llama(tmp_path / "model", layers=1)
    options = QuantizeOptions(max_shard_size=200_000)
    api.quantize(model, tmp_path / "here", options, device="cpu")
    api.quantize(model, tmp_path / "there", options, ray="auto", device="cpu")
    assert digests(tmp_path / "there") == digests(tmp_path / "here")
