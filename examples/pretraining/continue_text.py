"""Continue texts by a model that lm.py or unilm.py has trained, as it goes.

python examples/pretraining/continue_text.py runs/gpt2/model 今天天气 --tokens 40 --top-p 0.9
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="directory `model` of a run")
    add("text", help="what to continue")
    add("--tokens", type=int, default=40, help="tokens more, at most (default: 40)")
    add("--top-p", type=float, help="draw tokens within this mass (default: the likeliest)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    arguments = parser.parse_args(argv)

    from keras_ext.generation import Generator
    from keras_ext.models import build_transformer_model
    from keras_ext.text import WordPieceTokenizer

    tokenizer = WordPieceTokenizer(arguments.model / "vocab.txt")
    model = build_transformer_model(arguments.model, with_mlm=True)
    end = tokenizer.token_to_id("[SEP]")
    generator = Generator(model, end_token=end, seed=arguments.seed)
    prompt = tokenizer.encode(arguments.text).token_ids[:-1]  # without the [SEP]
    print(arguments.text, end="")
    tokens = generator.stream([prompt], arguments.tokens, top_p=arguments.top_p)
    for (token,) in tokens:
        print(tokenizer.vocabulary[token].removeprefix("##"), end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
