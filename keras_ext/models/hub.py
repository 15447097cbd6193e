"""Models of huggingface.co, or of the mirror that `HF_ENDPOINT` names.

Only configurations, vocabularies and weights are fetched, and no code: safetensors, or where a
repository has none, `pytorch_model.bin`, of which nothing is run. Files are kept by
`huggingface_hub`, which fetches them once, and goes on after an interruption.
"""

import os
import re
from pathlib import Path
from typing import TypeGuard

from keras_ext.models.huggingface_checkpoint import FILE, INDEX
from keras_ext.models.torch_checkpoint import TORCH_FILE, TORCH_INDEX

FILES = ["config.json", "bert_config.json", "tokenizer*.json", "vocab.txt", "*.safetensors*"]
TORCH_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]
# Names without an owner that huggingface.co keeps for models that had them before owners did.
NAMES = {
    **{f"bert-base-{x}": f"google-bert/bert-base-{x}" for x in ("chinese", "cased", "uncased")},
    **{f"bert-large-{x}": f"google-bert/bert-large-{x}" for x in ("cased", "uncased")},
    **{f"albert-{x}-v2": f"albert/albert-{x}-v2" for x in ("base", "large", "xlarge")},
    **{x: f"openai-community/{x}" for x in ("gpt2", "gpt2-medium", "gpt2-large", "openai-gpt")},
    **{f"t5-{x}": f"google-t5/t5-{x}" for x in ("small", "base", "large")},
}
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = "https://huggingface.co"


def download_model(repository: str) -> Path:
    """Fetch a model, unless it is there; the directory of its files.

    `HF_ENDPOINT` is read at the call. The rest is as `huggingface_hub` has it: `HF_HOME`,
    `HF_TOKEN`, `HF_HUB_OFFLINE`.

    Args:
        repository: its id, such as "hfl/rbt3", or a name such as "bert-base-chinese".

    Raises:
        ImportError: `huggingface_hub` is not installed.
        ValueError: that is no id, or the repository has neither safetensors nor
            `pytorch_model.bin`.
        OSError: there is no such repository, or it cannot be reached.

    Example, which needs the network:

        directory = download_model("hfl/rbt3")
        bert = build_transformer_model(directory)
        tokenizer = WordPieceTokenizer(directory / "vocab.txt")
    """
    repository = NAMES.get(repository, repository)
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"repository must be an id such as 'hfl/rbt3', or one of {', '.join(NAMES)}, got "
            f"{repository!r}."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "Models of huggingface.co need huggingface_hub: pip install 'keras-ext[nlp]'"
        ) from error
    endpoint = os.environ.get("HF_ENDPOINT", ADDRESS)
    try:
        for patterns, names in (
            (FILES, (FILE, INDEX)),
            (TORCH_FILES, (TORCH_FILE, TORCH_INDEX)),
        ):
            directory = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=patterns, endpoint=endpoint
                )
            )
            if any((directory / name).is_file() for name in names):
                return directory
    except Exception as error:  # its kinds differ between versions of huggingface_hub
        raise OSError(
            f"{repository} cannot be fetched from {endpoint} ({type(error).__name__}: "
            f"{error}). Check the id and the connection, set HF_ENDPOINT to a mirror, or give "
            "a directory with its files."
        ) from error
    raise ValueError(
        f"{repository} has neither {FILE} nor {TORCH_FILE}. Give a directory with the files of "
        "a TensorFlow checkpoint, or convert the model with transformers."
    )


def is_repository(name: str | os.PathLike) -> TypeGuard[str]:
    """Whether this can only mean a repository: owner/model, and neither is a local path, or a
    name that is no local path; a name in `.json` is that of a file."""
    if not isinstance(name, str) or Path(name).exists() or name.endswith(".json"):
        return False
    return name in NAMES or (
        REPOSITORY.fullmatch(name) is not None and not Path(name).parent.exists()
    )
