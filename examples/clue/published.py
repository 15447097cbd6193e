"""Published dev scores, in percent, of models to compare with.

Single runs or the best of a search over settings, so a point is not a difference. CMRC2018 is
exact match (F1), by the official definition. Sources: PaddleNLP's CLUE table (grid search), and
the tables of CLUEbenchmark/CLUE (ALBERT-tiny).
"""

TASKS = (
    "afqmc",
    "tnews",
    "iflytek",
    "cmnli",
    "ocnli",
    "cluewsc2020",
    "csl",
    "cmrc2018",
    "chid",
    "c3",
)

# Model -> scores in the order of TASKS; None where there is none.
DEV = {
    "UER RoBERTa-tiny, 2x128": (
        69.02, 51.47, 20.28, 59.95, 57.73, 63.82, 67.43, 3.08, 23.57, 28.12
    ),
    "UER RoBERTa-mini, 4x256": (
        69.32, 54.22, 41.63, 69.40, 67.36, 65.13, 70.07, 5.96, 51.19, 39.68
    ),
    "ALBERT-tiny": (69.13, 53.55, 48.76, 70.26, None, 57.7, 74.36, 48.31, 43.47, 50.58),
    "RBT3": (70.95, 55.53, 59.18, 76.20, 70.71, 67.11, 76.63, 55.73, 70.26, 54.93),
    "BERT-base": (74.63, 57.13, 61.29, 80.97, 75.22, 81.91, 81.90, 65.30, 82.01, 65.38),
    "RoBERTa-wwm-ext-large": (
        76.00, 59.33, 62.02, 83.88, 78.81, 90.79, 83.67, 70.58, 85.72, 75.26
    ),
}  # fmt: skip
