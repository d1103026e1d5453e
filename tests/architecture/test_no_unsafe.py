"""Nothing in the source can run code from a file, swallow what it should not, or rely on a check that -O removes."""

from __future__ import annotations

import ast

from tests.architecture.source import Module, modules

MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "tarfile", "code", "codeop",
}  # fmt: skip
NAMES = {"eval", "exec", "compile", "__import__", "hasattr", "globals", "execfile"}
CALLS = {
    "torch.load": "safetensors only",
    "torch.hub.load": "no code from elsewhere",
    "torch.jit.load": "no code from elsewhere",
    "yaml.load": "luthier.core.yaml_text",
    "yaml.unsafe_load": "luthier.core.yaml_text",
    "yaml.full_load": "luthier.core.yaml_text",
    "os.system": "subprocess with a list",
    "os.popen": "subprocess with a list",
    "tempfile.mktemp": "mkdtemp or mkstemp",
}
INSIDE = "src/luthier/sandbox/guest/"
"""What runs behind the walls of the sandbox: there, and nowhere else, code of others is run and fails as it likes."""
KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def test_nothing_unsafe_is_written() -> None:
    wrong = [complaint for module in modules() for complaint in complaints(module)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_each_danger_would_be_seen() -> None:
    dangers = [
        "import pickle", "from pickle import loads", "import joblib.x", "torch.load('x')", "eval('1')", "exec('1')",
        "subprocess.run('x', shell=True)", "np.load('x', allow_pickle=True)", "assert x", "hasattr(x, 'y')",
        "def f():\n    import pickle", "try:\n    pass\nexcept:\n    pass",
        "try:\n    pass\nexcept Exception:\n    pass",
        "M.from_pretrained('x', trust_remote_code=True)",
        "yaml.load('x', L)", "os.system('x')",
    ]  # fmt: skip
    for danger in dangers:
        assert complaints(Module("luthier.x", modules()[0].path, ast.parse(danger), 1)), danger
    fine = "model.eval()\nre.compile('x')\nyaml.safe_load('x')\nnp.load('x', allow_pickle=False)\nsafe.load('x')"
    assert not complaints(Module("luthier.x", modules()[0].path, ast.parse(fine), 1))
    inside = next(module.path for module in modules() if module.shown.startswith(INSIDE))
    assert not complaints(Module("luthier.x", inside, ast.parse("exec(compile(x, 'x', 'exec'))"), 1))
    assert complaints(Module("luthier.x", inside, ast.parse("import pickle"), 1))


def complaints(module: Module) -> list[str]:
    """Everything unsafe in a file, with its line."""
    found = [f"{module.shown}:{node.lineno}: {said}" for node in ast.walk(module.tree)
             if isinstance(node, (ast.stmt, ast.expr, ast.ExceptHandler)) and (said := _complaint(node))]  # fmt: skip
    inside = ("calls exec", "calls compile", "goes on; name what is expected")
    return [said for said in found if not (module.shown.startswith(INSIDE) and said.endswith(inside))]


def _complaint(node: ast.AST) -> str:
    if isinstance(node, ast.Assert):
        return "assert is removed by python -O; use if and raise"
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        return f"imports {', '.join(found)}" if found else ""
    if isinstance(node, ast.ImportFrom):
        return f"imports {node.module}" if (node.module or "").split(".")[0] in MODULES else ""
    if isinstance(node, ast.ExceptHandler):
        caught = ast.unparse(node.type) if node.type is not None else "everything"
        broad = caught in ("everything", "Exception", "BaseException")
        reraises = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
        passes_on = reraises or any(_keeps(inner, node.name) for inner in node.body)
        return f"catches {caught} and goes on; name what is expected" if broad and not passes_on else ""
    return _call(node) if isinstance(node, ast.Call) else ""


def _keeps(node: ast.stmt, name: str | None) -> bool:
    """Whether a handler keeps the error in an attribute: a thread does, for another one to raise."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id == name and all(isinstance(target, ast.Attribute) for target in node.targets)


def _call(node: ast.Call) -> str:
    name = ast.unparse(node.func)
    if isinstance(node.func, ast.Name) and name in NAMES:
        return f"calls {name}"
    if name in CALLS:
        return f"calls {name}; use {CALLS[name]}"
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in KEYWORDS and value is KEYWORDS[keyword.arg]:
            return f"passes {keyword.arg}={value}"
    return ""
