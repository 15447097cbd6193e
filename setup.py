"""Metadata of the distribution; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "keras_ext/__init__.py").read_text())[1]

nlp = ["tokenizers", "safetensors", "huggingface_hub"]
clue = [*nlp, "matplotlib", "nltk", "rich", "scikit-learn", "scipy", "seqeval"]
pretraining = [*clue, "jieba"]
export = ["onnx", "onnxruntime", "tf2onnx"]
notebooks = ["ipykernel", "jupytext", "nbclient"]

setup(
    name="keras-ext",
    version=version,
    description="Methods of papers and kexue.fm in Keras 3: optimizers, layers, Transformers",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url="https://github.com/keras-ext/keras-ext",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["keras_ext", "keras_ext.*"]),
    package_data={"keras_ext": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["keras>=3.10", "numpy"],
    extras_require={
        "tensorflow": ["tensorflow>=2.19"],
        "jax": ["jax"],
        "torch": ["torch"],
        "nlp": nlp,
        "clue": clue,
        "pretraining": pretraining,
        "test": [
            *pretraining,
            *notebooks,
            *export,
            "mypy",
            "optax",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
