"""Every public function and class is documented, and its example runs."""

import doctest
import inspect
from pathlib import Path

import pytest

import segadapt
from segadapt.platform.api import data, methods, models, operation, results, training, weights
from segadapt.platform.settings import resources
from segadapt.platform.storage import folders

IN_ORDER = (segadapt, folders, resources, methods, data, training, results, models, operation, weights)
"""Modules with examples: those of a later one use what those before have made, such as the search `demo`."""

SKIPPED = {"ui": "serves until it is interrupted"}


def examples() -> list[doctest.DocTest]:
    """All examples: of a module the functions first, as they stand there, then the classes of what they return."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = []
    for module in IN_ORDER:
        tests = [test for test in finder.find(module, module.__name__) if test.examples]
        found += sorted(tests, key=lambda test: (test.name.rpartition(".")[2][:1].isupper(), test.lineno or 0))
    return found


@pytest.mark.parametrize("name", segadapt.__all__)
def test_every_public_name_tells_what_it_takes_returns_and_raises(name: str) -> None:
    value = getattr(segadapt, name)
    text = inspect.getdoc(value) or ""
    if name == "UsageError":
        return
    assert "Example:\n" in text
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters
        assert not parameters or "Args:\n" in text
        assert "Returns:\n" in text or "Yields:\n" in text or name == "list_methods"
        assert all(f"    {parameter}: " in text for parameter in parameters), "every argument is explained"


@pytest.mark.slow
def test_the_examples_of_the_public_functions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    printed: list[str] = []
    for test in examples():
        test.globs = {}
        runner.run(test, out=printed.append)
    assert not runner.summarize(verbose=False).failed, "".join(printed)
    assert {test.name.rpartition(".")[2] for test in examples()} >= set(segadapt.__all__) - {"UsageError"}
    skipped = {
        test.name.rpartition(".")[2]
        for test in examples()
        if any(example.options.get(doctest.SKIP) for example in test.examples)
    }
    assert skipped == set(SKIPPED)
