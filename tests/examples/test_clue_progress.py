import io
from types import SimpleNamespace

import pytest
from progress import EpochProgress
from rich.console import Console

FIGURES = {"loss": 1.0, "dev_loss": 1.1, "dev_accuracy": 0.5, "seconds": 2.0}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_a_line_an_epoch_everywhere(terminal):
    screen, history = io.StringIO(), []
    record = SimpleNamespace(history=history, metric="accuracy")
    console = Console(file=screen, force_terminal=terminal, width=120)
    with EpochProgress(console, epochs=2, examples=10, record=record) as progress:
        progress.set_params({"steps": 3})
        for epoch in range(2):
            progress.on_epoch_begin(epoch)
            for batch in range(3):
                progress.on_train_batch_end(batch, {"crossentropy": 0.25})
            progress.bar.refresh()
            history.append({**FIGURES, "dev_accuracy": 0.5 - epoch / 10})
            progress.on_epoch_end(epoch)
    shown = screen.getvalue()
    assert ("loss 0.250  best dev accuracy 50.00%" in shown) is terminal
    assert "epoch 1/2  loss 1.000  dev loss 1.100  dev accuracy 50.00% (best 50.00%)" in shown
    assert "dev accuracy 40.00% (best 50.00%)  2.0 s, 5 examples/s" in shown
