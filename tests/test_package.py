"""What holds for the repository as a whole: imports, the public address, private names."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras

import keras_ext

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = {"tensorflow", "jax", "torch"}


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_imports_no_backend_that_keras_did_not():
    # What Keras or its own dependencies imported is not ours to forbid; the others raise here.
    others = sorted(BACKENDS - {keras.backend.backend()})
    block = f"import sys, keras; [sys.modules.setdefault(name, None) for name in {others}]"
    code = (
        f"{block}; import keras_ext; print(keras_ext.optimizers.AccumOptimizer('sgd', 2).name)"
    )
    assert run_python(code) == "accum_optimizer"


def test_an_unknown_backend_is_refused():
    code = "try:\n    import keras_ext\nexcept ImportError as error:\n    print(error)"
    assert "got 'numpy'. Set KERAS_BACKEND" in run_python(code, KERAS_BACKEND="numpy")


def test_only_the_backend_package_imports_a_backend_and_nothing_imports_keras_src():
    for path in (ROOT / "keras_ext").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imported = {
            name
            for node in nodes
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        }
        assert not [name for name in imported if name.startswith("keras.src")], path
        if path.parent.name != "backend":
            assert not {name.split(".")[0] for name in imported} & BACKENDS, path


def test_private_names_of_keras_are_used_in_the_base_of_optimizers_and_exist():
    files = list((ROOT / "keras_ext/optimizers").glob("*.py"))
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    defined, used = set(), {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, set()).add(file)
            elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w*", str(node.value)):
                used.setdefault(node.value, set()).add(file)  # of getattr
    private = {n: used[n] for n in used if n[0] == "_" and n[:2] != "__" and n not in defined}
    optimizer, variable = keras.optimizers.SGD(), keras.Variable([0.0])
    optimizer.build([variable])
    assert {"_variables", "_trainable_variables", "_use_weight_decay"} <= set(private)
    for name, where in private.items():
        assert where <= {"base.py", "wrapper.py"}, (name, where)
        assert hasattr(optimizer, name) or hasattr(variable, name), name
    assert hasattr(variable, "_value")  # of backend/jax.py


def test_the_public_address_is_that_of_setup():
    url = re.search(r'url="(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"))[1]
    owner = url.removeprefix("https://github.com/")
    documents = [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    texts = [
        path.read_text(encoding="utf-8") for path in documents if ".venv" not in path.parts
    ]
    links = [m for text in texts for m in re.findall(r"github\.com/([\w.-]+/keras-ext)", text)]
    assert links
    assert set(links) == {owner}
    for path in ROOT.glob("notebooks/*.ipynb"):
        assert owner in json.dumps(json.loads(path.read_text(encoding="utf-8")))


def test_both_readmes_say_the_same():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")
    )
    for pattern in (r"^```.*?^```$", r"\]\((?!README)[^)]+\)", r"^\|"):
        found = [re.findall(pattern, text, re.M | re.S) for text in (english, chinese)]
        strip = [[re.sub(r"#.*", "", item) for item in items] for items in found]
        assert strip[0] == strip[1], pattern


def test_every_public_name_has_a_docstring_with_an_example():
    without_example = {"Encoding", "CheckpointReport"}
    without_example.add("download_model")  # its example needs the network
    for part in map(keras_ext.__dict__.get, keras_ext.__all__):
        public = {name: getattr(part, name) for name in part.__all__}
        for module in [thing for thing in public.values() if inspect.ismodule(thing)]:
            public |= {
                name: thing
                for name, thing in vars(module).items()
                if inspect.isclass(thing) and thing.__module__ == module.__name__
            }
        for name, thing in public.items():
            assert thing.__doc__, name
            if callable(thing) and name not in without_example:  # no module, no table
                assert ">>>" in thing.__doc__, name
