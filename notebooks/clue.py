# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CLUE: from the official files to the file that is submitted
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/clue.ipynb)
#
# **摘要**：[CLUE](https://github.com/CLUEbenchmark/CLUE) 各任务的微调，从官方数据文件一直做到
# 可提交的 `submit.zip`（[8739](https://kexue.fm/archives/8739)）。这里用仓库自带的 450 条 TNEWS
# 样例，几十秒即可跑完：看数据文件，用一条命令训练，读 `metrics.jsonl` 画学习曲线，看预测结果，
# 用 `report.py` 汇总，用 `submit.py` 对照测试文件检查并打包，最后加一个自己的任务
# （一个二十来行的文件，加设置表中的两行）。样例只用来走通流程，准确率不代表 TNEWS；
# 换成真实数据和预训练模型，只是多给 `--data`、`--download`、`--model` 几个参数，见文末。
# 每一节的论断都有 `assert` 检验。
#
# Fine-tuning on [CLUE](https://github.com/CLUEbenchmark/CLUE) by
# [examples/clue](https://github.com/keras-ext/keras-ext/tree/main/examples/clue), from the
# official files to the archive to submit, and a task of one's own at the end. The data are the
# sample of 450 sentences that comes with it, in the format of TNEWS: it is enough to see
# everything work, and its accuracy says nothing about TNEWS. What changes with real data and a
# pretrained model is [below](#With-real-data). A CPU is enough here.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if importlib.util.find_spec("keras_ext") is None:  # in Colab, for instance
    package = "keras-ext[clue,tensorflow] @ git+https://github.com/keras-ext/keras-ext"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# %%
import json
import shlex
import zipfile

import matplotlib.pyplot as plt

# %% [markdown]
# The examples are no part of the package: they are copied from the checkout around this
# notebook, or else cloned, to a folder where nothing is lost.

# %%
folder = Path(tempfile.mkdtemp()).resolve()
here = [path for path in (Path.cwd(), *Path.cwd().parents) if (path / "examples/clue").is_dir()]
if here:
    shutil.copytree(here[0] / "examples/clue", folder / "examples/clue")
else:
    source = "https://github.com/keras-ext/keras-ext"
    subprocess.run(["git", "clone", "-q", "--depth", "1", source, folder], check=True)
os.chdir(folder)

# %%
_ = os.environ.pop("FORCE_COLOR", None)  # set by notebooks, where bars cannot move
BLUE, RED = "#0072B2", "#D55E00"
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})


def python(command):
    """Run `python COMMAND` as in a terminal; its exit status."""
    print(f"$ python {command}")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], capture_output=True, text=True
    )
    shown = done.stdout + (done.stderr if done.returncode else "")
    print(shown.replace(f"{folder}/", "").strip())
    return done.returncode


def read_lines(file):
    """The objects of a file with one JSON object a line, as most files of CLUE are."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


# %% [markdown]
# ## 1. The files
#
# An official archive of TNEWS holds these five files. Two are tests, of version 1.0 and 1.1 of
# the leaderboard, and have no labels. The codes are not contiguous: there is no 105 and no 111.

# %%
SAMPLE = Path("examples/clue/sample/tnews")
for file in sorted(SAMPLE.iterdir()):
    lines = read_lines(file)
    print(f"{file.name:14} {len(lines):4} lines, such as {lines[0]}")
label_names = {line["label"]: line["label_desc"] for line in read_lines(SAMPLE / "labels.json")}
assert len(label_names) == 15
assert not {"105", "111"} & label_names.keys()
assert {line["label"] for line in read_lines(SAMPLE / "train.json")} <= label_names.keys()
assert not any("label" in line for line in read_lines(SAMPLE / "test.json"))

# %% [markdown]
# ## 2. One command
#
# Without `--data` the sample is used, without `--model` a BERT of two layers of width 128 is
# trained from scratch, on a vocabulary made from the training sentences. Settings are flags,
# and the task's defaults for what is not given (`run.py --help`).

# %%
EPOCHS = 6
assert python(f"examples/clue/run.py tnews --epochs {EPOCHS} --output runs/tnews") == 0
config = json.loads(Path("runs/tnews/config.json").read_text(encoding="utf-8"))
print({name: config[name] for name in ("layers", "hidden", "batch_size", "learning_rate")})
assert config["epochs"] == EPOCHS

# %% [markdown]
# Sentences were batched by length. The run has a directory with everything that it was made of
# and what came out; had it been killed, the same command with `--resume` would go on from the
# last whole epoch. Once finished it is not repeated:

# %%
assert python(f"examples/clue/run.py tnews --epochs {EPOCHS} --output runs/tnews --resume") == 0

# %% [markdown]
# ## 3. The learning curve
#
# `metrics.jsonl` has a line an epoch (`learning_curve.png` is drawn from the same). The
# submission is made with the weights of the epoch that is best on dev, kept in
# `best.weights.h5`.

# %%
history = read_lines("runs/tnews/metrics.jsonl")
result = json.loads(Path("runs/tnews/result.json").read_text(encoding="utf-8"))
print(history[-1])
best = max(history, key=lambda line: line["dev_accuracy"])
assert len(history) == EPOCHS
assert best["dev_accuracy"] == result["dev_accuracy"] > 3 / 15  # one in fifteen by chance

epochs = [line["epoch"] for line in history]
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
    axes.plot(epochs, [line[name] for line in history], "o-", color=BLUE, label="train")
    axes.plot(epochs, [line[f"dev_{name}"] for line in history], "s--", color=RED, label="dev")
    axes.set(xlabel="epoch", ylabel=name, xticks=epochs)
    axes.legend()
panels[1].plot(best["epoch"], best["dev_accuracy"], "*", color=RED, markersize=16)
plt.show()

# %% [markdown]
# ## 4. The predictions
#
# One line for every line of the test, ids as text, labels as the codes of the files.

# %%
test = read_lines(SAMPLE / "test.json")
answers = read_lines("runs/tnews/tnews11_predict.json")
print("as written:", answers[0])
for line, answer in zip(test[:8], answers, strict=False):
    print(f"{label_names[answer['label']]:20} {line['sentence']}")
assert [answer["id"] for answer in answers] == [str(line["id"]) for line in test]
assert {answer["label"] for answer in answers} <= label_names.keys()

# %% [markdown]
# ## 5. Beside published scores
#
# `report.py` collects all finished runs below a folder, by what they started from; several
# seeds (`run.py --runs 3`) become mean and deviation. It prints the table, and writes it and a
# picture. The row from scratch is the sample, so here it compares nothing yet.

# %%
assert python("examples/clue/report.py runs --output report") == 0
row = f"| from scratch, 2x128 | - | {100 * result['dev_accuracy']:.2f} |"
assert row in Path("report.md").read_text(encoding="utf-8")

# %% [markdown]
# ## 6. Checked, and packed
#
# `submit.py` holds every file against the official test: all ids, each once, in order, and only
# answers that the task knows. An answer that got lost is told in one line, and nothing is
# written.

# %%
predictions = Path("runs/tnews/tnews11_predict.json")
whole = predictions.read_text(encoding="utf-8")
predictions.write_text("".join(whole.splitlines(keepends=True)[:-1]), encoding="utf-8")
assert python("examples/clue/submit.py runs/tnews --output submit.zip") == 2
assert not Path("submit.zip").exists()
_ = predictions.write_text(whole, encoding="utf-8")

# %%
assert python("examples/clue/submit.py runs/tnews --output submit.zip") == 0
with zipfile.ZipFile("submit.zip") as archive:
    assert archive.namelist() == ["tnews10_predict.json", "tnews11_predict.json"]
    assert archive.read("tnews11_predict.json").decode() == whole

# %% [markdown]
# ## 7. A task of one's own
#
# Is a headline about money? A task is a file with what is particular to it: the official files
# and their lines, the head, the format of the submission. (AFQMC, TNEWS, IFLYTEK, CMNLI and
# OCNLI are as short; other heads extract spans, choose or find entities.)

# %%
MONEY = '''"""Money: whether a headline is about finance, stocks or houses.

Lines are {"label": "yes", "title": ...}, those of the test {"id": 0, "title": ...}.
Metric: accuracy. Submission: {"id": "0", "label": "yes"} a line.
"""

from pathlib import Path

from data import TaskData, is_label, read_task
from submission import LINES

# The module that builds the head and scores it; the format of submissions; what they may say.
HEAD = "classification"
FORMAT, is_answer = LINES, is_label
TESTS = {"money_predict.json": "test.json"}

LABELS = ["no", "yes"]
LINE = {"label": "yes", "title": "房贷利率又降了"}  # as every line must be


def load(directory: Path) -> TaskData:
    """Read train.json, dev.json and test.json."""
    return read_task(directory, LABELS, LINE, lambda entry: entry["title"], TESTS)
'''
assert len(MONEY.splitlines()) <= 25
_ = Path("examples/clue/money.py").write_text(MONEY, encoding="utf-8")

# %% [markdown]
# In the table of settings it gets two rows, from scratch and pretrained; and here are its
# files, made of the sample.

# %%
settings = Path("examples/clue/settings.py")
table = "TABLE: dict[tuple[str, str], dict[str, Any]] = {\n"
rows = """    ("money", "scratch"): {**SCRATCH, "batch_size": 16, "epochs": 3},
    ("money", "pretrained"): REFERENCE,
"""
text = settings.read_text(encoding="utf-8")
assert text.count(table) == 1
settings.write_text(text.replace(table, table + rows), encoding="utf-8")

ABOUT_MONEY = {"news_finance", "news_stock", "news_house"}
Path("money").mkdir()
for name in ("train.json", "dev.json", "test.json"):
    with open(f"money/{name}", "w", encoding="utf-8") as file:
        for line in read_lines(SAMPLE / name):
            about = "yes" if line.get("label_desc") in ABOUT_MONEY else "no"
            known = {"id": line["id"]} if "id" in line else {"label": about}
            print(json.dumps({**known, "title": line["sentence"]}), file=file)

assert python("examples/clue/run.py money --data money --output runs/money") == 0
shares = [line["label"] == "no" for line in read_lines("money/dev.json")]
accuracy = json.loads(Path("runs/money/result.json").read_text())["dev_accuracy"]
print(f"dev accuracy {accuracy:.1%}, of always saying no {sum(shares) / len(shares):.1%}")
assert accuracy >= sum(shares) / len(shares)

# %% [markdown]
# All that was shown before works for it: every line of its files is checked, and a fault is
# named with its place.

# %%
with open("money/train.json", "a", encoding="utf-8") as file:
    print(json.dumps({"label": "perhaps", "title": "金价"}), file=file)
assert python("examples/clue/run.py money --data money --output runs/again") == 2
assert not Path("runs/again").exists()

# %% [markdown]
# ## With real data
#
# `--download` fetches the official archive and unpacks it to `--data`, unless there are files
# already. `--model` is a directory with the configuration, the vocabulary and the checkpoint of
# a BERT, Google's or Hugging Face's; the settings are then those of the bert4keras baselines.
#
# ```bash
# python examples/clue/run.py tnews --data clue/tnews --download     # from scratch
# python examples/clue/run.py tnews --data clue/tnews --model path/to/bert
# ```
#
# In Colab, with a GPU (XLA is used there; the first epoch compiles):
#
# ```python
# from huggingface_hub import snapshot_download
#
# files = ["*.json", "vocab.txt", "model.safetensors"]
# snapshot_download("google-bert/bert-base-chinese", local_dir="bert", allow_patterns=files)
# ```
#
# All eleven tasks with three seeds each, a table of all, one archive for the leaderboard. What
# is finished is not run again, so a session that ended goes on with `--resume`:
#
# ```bash
# python examples/clue/run.py all --data clue --download --model bert --runs 3 --output runs
# python examples/clue/report.py runs --output report
# python examples/clue/submit.py runs/*/seed-0 --output submit.zip
# ```
#
# Tasks, flags and files of a run are described in
# [examples/clue](https://github.com/keras-ext/keras-ext/tree/main/examples/clue#readme).
