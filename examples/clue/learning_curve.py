"""Loss and accuracy by epoch, as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def plot(history: list[dict], path: Path) -> None:
    """Write a PNG of two panels: loss and accuracy, on train (with dropout) and dev."""
    # A bare Figure draws with Agg and needs no display.
    figure = Figure(figsize=(8, 3), layout="constrained")
    epochs = [figures["epoch"] for figures in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "train"), (f"dev_{name}", "dev")):
            axes.plot(epochs, [figures[key] for figures in history], marker="o", label=label)
        axes.set(xlabel="epoch", ylabel=name, xticks=epochs)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
