"""Which kernels serve which device, that all of them offer the same, and what happens where none can be compiled."""

import inspect
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import packings
import pytest
import torch
from code_groups import switch_kernels_off
from packings import random_words

from convert_w4a8 import devices, kernels
from convert_w4a8.encoding import lut_layout
from convert_w4a8.encoding.tables import expand_tables
from convert_w4a8.kernels.activations import reference as activations_reference
from convert_w4a8.kernels.blocks import reference as blocks_reference
from convert_w4a8.kernels.codebooks import reference as codebooks_reference
from convert_w4a8.kernels.codes import reference as codes_reference
from convert_w4a8.kernels.gemm import reference as gemm_reference
from convert_w4a8.kernels.repack import reference as repack_reference
from convert_w4a8.kernels.tables import reference as tables_reference
from convert_w4a8.kernels.training import reference as training_reference
from convert_w4a8.linear import Packing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FOLDER = Path(next(iter(kernels.__path__)))
OPERATIONS = pytest.mark.parametrize("operation", devices._OPERATIONS)
REFERENCES = {
    "repack": repack_reference,
    "codes": codes_reference,
    "tables": tables_reference,
    "gemm": gemm_reference,
    "codebooks": codebooks_reference,
    "activations": activations_reference,
    "training": training_reference,
    "blocks": blocks_reference,
}


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """Forget what can compile kernels, before and after."""
    cached = (devices._numba_works, devices._triton_works, devices._triton_problem)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def find(operation: str, device: torch.device) -> ModuleType:
    """Return the module that serves a device."""
    found: ModuleType = getattr(devices, operation)(device)
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what gives the lines that were logged."""
    caplog.set_level(logging.DEBUG, "convert_w4a8")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("convert_w4a8")]


def files_of(operation: str) -> list[str]:
    """Return the files that serve a device, without their suffix; others beside them are not an operation's."""
    return [name for name in ("cpu", "gpu", "reference") if (FOLDER / operation / f"{name}.py").is_file()]


def test_every_folder_of_kernels_is_an_operation() -> None:
    """And the other way round."""
    folders = {path.parent.name for path in FOLDER.glob("*/*.py")}
    assert folders == set(devices._OPERATIONS) == set(REFERENCES)


@OPERATIONS
def test_the_table_names_the_files_that_exist(operation: str) -> None:
    """All of them, and no others; the reference serves what no file is named for."""
    named = set(devices._OPERATIONS[operation].values())
    assert sorted(named | {"reference"}) == files_of(operation)
    assert set(devices._OPERATIONS[operation]) <= {"cpu", "cuda"}


@pytest.mark.parametrize(
    ("operation", "file"), [(name, file) for name in devices._OPERATIONS for file in files_of(name)]
)
def test_every_file_offers_what_its_protocol_says(operation: str, file: str) -> None:
    """The same functions, with the same parameters and results."""
    if file in ("gpu", "cpu"):
        pytest.importorskip({"gpu": "triton", "cpu": "numba"}[file])
    module = import_module(f"convert_w4a8.kernels.{operation}.{file}")
    protocol = inspect.signature(getattr(devices, operation)).return_annotation
    methods = {name: method for name, method in vars(protocol).items() if inspect.isfunction(method) and name[0] != "_"}
    assert methods
    for name, method in methods.items():
        of_instance, *parameters = inspect.signature(method).parameters.values()
        assert of_instance.name == "self"
        found = inspect.signature(getattr(module, name))
        assert list(found.parameters.values()) == parameters, name
        assert found.return_annotation == inspect.signature(method).return_annotation, name


@OPERATIONS
def test_every_device_has_its_own_kernels(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's on CUDA, whichever GPU it is, numba's on a CPU where there are some, references on other devices."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(devices, "_triton_works", lambda: True)
    assert find(operation, torch.device("cuda:1")) is import_module(f"convert_w4a8.kernels.{operation}.gpu")
    on_cpu = "cpu" if (FOLDER / operation / "cpu.py").is_file() else "reference"
    assert find(operation, CPU) is import_module(f"convert_w4a8.kernels.{operation}.{on_cpu}")
    assert find(operation, torch.device("meta")) is REFERENCES[operation]


@OPERATIONS
def test_tests_can_switch_kernels_off(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what they compare with a kernel is not that kernel."""
    switch_kernels_off(monkeypatch)
    assert [find(operation, device) for device in (CPU, CUDA)] == [REFERENCES[operation]] * 2


def without(module: str, error: Exception) -> Callable[[str], ModuleType]:
    """Return an `import_module` that fails for one module."""

    def failing(name: str) -> ModuleType:
        if name == module:
            raise error
        return import_module(name)

    return failing


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        ("numba.core.config", ModuleNotFoundError("No module named 'numba'"), "No module named 'numba'"),
        ("numba", ImportError("Numba needs NumPy 2.4 or less"), "Numba needs NumPy 2.4 or less"),
        (
            "convert_w4a8.kernels.repack.cpu",
            RuntimeError("cannot cache function '_swap': no locator available for file"),
            "there is no directory to keep compiled kernels in; set NUMBA_CACHE_DIR",
        ),
    ],
    ids=["numba is absent", "numba refuses", "no place for its cache"],
)
def test_without_numba_the_references_do_the_work(
    module: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """What keeps numba from working keeps nobody from converting; one line says so, however often it is asked."""
    monkeypatch.setattr(devices, "import_module", without(module, error))
    for _ in range(2):
        for operation, reference in REFERENCES.items():
            assert find(operation, CPU) is reference
    assert said() == [f"numba cannot be used ({reason}): torch does the same work, many times slower"]
    for packing in packings.ALL:
        words = random_words(packing, 16, 32)
        assert torch.equal(lut_layout.reorder(words, packing), repack_reference.reorder(words, packing))


@pytest.mark.parametrize("module", ["numba", "convert_w4a8.kernels.repack.cpu"])
def test_a_bug_in_a_kernel_is_not_hidden(
    module: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """Other errors come out."""
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(devices, "import_module", without(module, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        devices.repack(CPU)
    assert said() == []


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("a C compiler", "Failed to find C compiler. Please specify via CC environment variable"),
        ("words for it", "RuntimeError"),
        ("Triton", "it is not installed"),
    ],
)
def test_without_triton_the_references_do_the_work(
    lacks: str, reason: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """A GPU machine without a compiler, as container images are, still converts; one line says what it lacks."""
    if lacks == "Triton":
        monkeypatch.setattr(devices, "find_spec", lambda _name: None)
    else:

        def failing() -> None:
            raise RuntimeError("" if lacks == "words for it" else f"{reason}\nor set triton.knobs.build.impl.")

        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=failing))

        def import_fake(name: str) -> Any:
            return SimpleNamespace(driver=driver) if name == "triton.runtime" else import_module(name)

        monkeypatch.setattr(devices, "import_module", import_fake)
    for _ in range(2):
        for operation, reference in REFERENCES.items():
            assert find(operation, CUDA) is reference
    assert said() == [f"Triton cannot be used ({reason}): torch does the same work, many times slower"]
    if torch.cuda.is_available():
        words = random_words(Packing.GPTQ, 16, 32)
        found = lut_layout.reorder(words.to(CUDA), Packing.GPTQ)
        assert torch.equal(found.cpu(), repack_reference.reorder(words, Packing.GPTQ))


def test_triton_works_where_there_is_a_gpu(said: Callable[[], list[str]]) -> None:
    """Kernels are found on a GPU, and are not where no driver is."""
    pytest.importorskip("triton", reason="Triton is not installed")
    has_gpu = torch.cuda.is_available()
    for operation, reference in REFERENCES.items():
        gpu = import_module(f"convert_w4a8.kernels.{operation}.gpu")
        assert find(operation, CUDA) is (gpu if has_gpu else reference)
    assert len(said()) == (0 if has_gpu else 1)


def test_numba_works_here(said: Callable[[], list[str]]) -> None:
    """Without a word."""
    pytest.importorskip("numba", reason="numba is not installed")
    assert devices.repack(CPU) is import_module("convert_w4a8.kernels.repack.cpu")
    assert said() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: kernels run interpreted, nothing dispatches")
def test_cuda_tensors_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reorder` and `expand_tables` hand over; the references run on the device as well."""
    words = random_words(Packing.AWQ, 64, 128).to(CUDA)
    expected = repack_reference.reorder(words, Packing.AWQ)
    scale = torch.arange(256, dtype=torch.uint8, device=CUDA).view(torch.float8_e4m3fn)
    entries = tables_reference.expand_tables(scale)
    for module, name in ((repack_reference, "reorder"), (tables_reference, "expand_tables")):
        monkeypatch.delattr(module, name)
    assert torch.equal(lut_layout.reorder(words, Packing.AWQ), expected)
    assert torch.equal(expand_tables(scale).view(torch.uint8), entries.view(torch.uint8))
