"""The map's guard: which file may import what. Floors are counted as the architecture counts them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAYS_IN = ("cli", "clipteacher")  # above all else: the command line and Python
FILES = sorted(
    [*ROOT.glob("cache/**/*.py"), *ROOT.glob("pipeline/**/*.py"), *(ROOT / f"{door}.py" for door in WAYS_IN)]
)

# The one file through which a package is reached.
DOORS = {
    "zarr": {"cache/store.py"},
    "fsspec": {"cache/places.py"},
    "faiss": {"pipeline/ops/kmeans_faiss.py"},
    "open_clip": {"pipeline/models/clip.py", "pipeline/models/towers.py"},
    "timm": {
        "pipeline/models/clip.py",
        "pipeline/models/towers.py",
        "pipeline/models/second.py",
        "pipeline/models/decoders.py",
        "pipeline/models/segnext.py",
    },
    "segmentation_models_pytorch": {"pipeline/models/decoders.py"},
    "transformers": {"pipeline/models/huggingface.py"},
    "dask": {"pipeline/running/engine.py"},
    "pydensecrf": {"pipeline/teaching/crf.py"},
    "gradio": {"pipeline/demo.py"},
    "pycocotools": {"pipeline/data/coco.py"},
    "ijson": {"pipeline/data/coco.py", "pipeline/data/label_studio.py"},
}
# Folders from the ground up: each imports those before it, and the cache from `running` on. Last the stages themselves,
# the files of pipeline/ that no folder holds.
FLOORS = ("config", "ops", "data", "models", "running", "teaching", "learning", "looking")
GROUND = ("__init__", "terminal")
STAGES = sorted(path.stem for path in ROOT.glob("pipeline/*.py") if path.stem not in GROUND)


def floor(module: str) -> int:
    """The place of a module's folder in FLOORS; then the stages, then the ways in. The cache stands beside them."""
    parts = module.split(".")
    if parts[0] in WAYS_IN:
        return len(FLOORS) + 1
    second = parts[1] if len(parts) > 1 else "__init__"
    if second in GROUND:
        return 0
    return len(FLOORS) if second in STAGES else FLOORS.index(second)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    own = path.relative_to(ROOT).as_posix()
    mine = 0 if own.startswith("cache/") else floor(module_of(path))
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "evidence", f"{own}: what is installed imports nothing of what proves it"
        assert top not in DOORS or own in DOORS[top], f"{own} imports {top}; its door is {DOORS[top]}"
        if top == "cache":
            is_allowed = own.startswith("cache/") or mine >= FLOORS.index("running")
            assert is_allowed, f"{own} reaches into the cache"
        if top == "pipeline":
            assert not own.startswith("cache/"), f"{own}: the cache never imports the pipeline"
            other = name if (ROOT / (name.replace(".", "/") + ".py")).exists() else name.rsplit(".", 1)[0]
            assert floor(other) <= mine, f"{own} (floor {mine}) imports {other} (floor {floor(other)})"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions count as well."""
    names = {module_of(path).removesuffix(".__init__"): path for path in FILES}
    waiting = {name: (imports(path) & names.keys()) - {name} for name, path in names.items()}
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, {name: sorted(others & waiting.keys()) for name, others in waiting.items()}


def test_every_stage_of_the_table_has_its_file() -> None:
    from pipeline.running.table import STAGES as TABLE

    for stage in TABLE.values():
        if stage.work:
            module = stage.work.partition(":")[0]
            assert module.split(".")[1] in STAGES
            assert stage.loaded().name == stage.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_stages_do_not_meet(path: Path) -> None:
    own = module_of(path).split(".")
    if len(own) == 2 and own[0] == "pipeline" and own[1] in STAGES:
        others = {f"pipeline.{stage}" for stage in STAGES if stage != own[1]}
        assert not imports(path) & others


@pytest.mark.parametrize("path", sorted(ROOT.glob("pipeline/ops/*.py")), ids=lambda p: p.name)
def test_ops_are_pure(path: Path) -> None:
    allowed = {"torch", "numpy", "pipeline", *sys.stdlib_module_names}
    if path.name == "kmeans_faiss.py":
        allowed |= {"faiss"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed
    assert not {"pathlib", "os", "io", "shutil"} & {name.split(".")[0] for name in imports(path)}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_training_machine_needs_no_teacher() -> None:
    assert not {"open_clip", "faiss", "dask", "distributed"} & loaded_by("import pipeline.train")


def test_help_loads_no_torch() -> None:
    assert not {"torch", "zarr", "numpy"} & loaded_by("import cli")


def test_importing_the_api_loads_no_torch() -> None:
    assert not {"torch", "zarr", "numpy"} & loaded_by("import clipteacher; clipteacher.read_config('demo')")


def test_loading_a_run_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert not {"torch", "zarr"} & loaded_by(f"import clipteacher; clipteacher.load({str(tmp_path)!r})")


def test_no_module_hides_one_of_pythons() -> None:
    assert not {path.stem for path in FILES} - {"__init__"} & set(sys.stdlib_module_names)
