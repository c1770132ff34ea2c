"""What comes from a disk is data, never code: no call in the package, examples or benchmarks can run what it reads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("automode", "examples", "benchmarks")


def keyword(call: ast.Call, name: str) -> object:
    """Return the constant given for a keyword argument, or None."""
    values = [given.value for given in call.keywords if given.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def is_unsafe(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name.endswith("safetensors.torch.load"):
        return False
    if name.endswith("torch.load"):
        return keyword(call, "weights_only") is not True
    if name in {"np.load", "numpy.load"}:
        return (
            any(given.arg == "allow_pickle" for given in call.keywords)
            and keyword(call, "allow_pickle") is not False
        )
    if name in {"yaml.load", "yaml.load_all"}:
        # a loader of ours must be one of the safe family, which the name has to say
        return "Safe" not in ast.unparse(call)
    return name in {
        "yaml.unsafe_load",
        "yaml.full_load",
        "pickle.load",
        "pickle.loads",
        "joblib.load",
        "eval",
        "exec",
    }


def unsafe_calls(text: str) -> list[str]:
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and is_unsafe(node)
    ]


def test_nothing_that_is_read_can_run() -> None:
    sources = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    found = {
        path.relative_to(REPOSITORY).as_posix(): calls
        for path in sources
        if (calls := unsafe_calls(path.read_text(encoding="utf-8")))
    }
    assert sources
    assert found == {}


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "pickle.loads(b)",
        "eval(s)",
    ],
)
def test_a_call_that_could_run_what_it_reads_is_seen(call: str) -> None:
    assert unsafe_calls(call) == [call]


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "yaml.safe_load(f)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "model.eval()",
    ],
)
def test_a_safe_call_is_left_alone(call: str) -> None:
    assert unsafe_calls(call) == []
