"""`make demo`: fine-tune a small model on this machine, and show that it learned.

    python -m tinker_hpc.demo [--steps 100] [--out demo-output]

Submits `sft.train`, an ordinary Tinker program, exactly as on a cluster, with cluster="local". Ends with the
loss and a sample before and after, a loss curve, and a PEFT adapter that transformers + peft load and agree with.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import tinker_hpc
from tinker_hpc.checkpoints import export_peft, find_checkpoint
from tinker_hpc.errors import ConfigError, TinkerHpcError, WeightsError
from tinker_hpc.recipes import sft
from tinker_hpc.recipes.sft import SftResult

BASE_MODEL = Path(__file__).resolve().parent.parent / "tests" / "models" / "tiny-qwen3"
# float32 on both sides, but other kernels and another order of summation; as in the table of promises.
LARGEST_GAP = 1e-4
POLL_S = 0.3


def watch(run: tinker_hpc.Run, num_steps: int, console: Console) -> None:
    """Show a run until its loop is over: why it waits, then a bar with the loss of the newest step."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar, shown = progress.add_task("submitted", total=num_steps), 0
        while True:
            status = run.status()
            steps = run.metrics()
            if steps:
                text = f"training, loss {steps[-1]['loss_per_token']:.3f}"
            else:
                text = status.reason or status.phase or status.state.value.lower()
            progress.update(bar, completed=len(steps), description=text)
            if not console.is_terminal and len(steps) >= shown + 10:  # a log gets a line now and then, not a bar
                shown = len(steps)
                console.print(f"step {shown} of {num_steps}: {text}")
            if status.finished:
                return
            time.sleep(POLL_S)


def draw_losses(losses: list[float], loss_before: float, loss_after: float, path: Path) -> None:
    """The loss of each step's batch, with the held-out loss at both ends, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(range(1, len(losses) + 1), losses, label="training batch")
    axes.plot([0, len(losses)], [loss_before, loss_after], "o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="nats per answer token", ylim=(0, None))
    axes.set_title("tiny-qwen3 learns to answer as a ship's mate (LoRA, rank 16)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def peft_logprobs(base_model: Path, adapter: Path, tokens: list[int]) -> list[float]:
    """Natural logprobs of tokens 1.. given those before, by transformers and peft alone, in float32."""
    import torch
    import transformers
    from peft import PeftModel

    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5 for an attribute that it has renamed
        warnings.simplefilter("ignore", FutureWarning)
        base = transformers.AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokens_T = torch.tensor(tokens)
    with torch.no_grad():
        logprobs_TV = model(tokens_T[None]).logits[0].log_softmax(-1)
    return logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0].tolist()


def check_adapter(base_model: Path, adapter: Path, result: SftResult) -> float:
    """Largest difference in logprob between peft and the trained sampler, over a held-out conversation.

    Raises: WeightsError if it is more than LARGEST_GAP.
    """
    expected = peft_logprobs(base_model, adapter, result.check_tokens)
    gap = max(abs(ours - theirs) for ours, theirs in zip(result.check_logprobs, expected, strict=True))
    if not gap <= LARGEST_GAP:
        raise WeightsError(
            f"the adapter in {adapter}, loaded by peft, gives logprobs that differ from the trained sampler's by up to "
            f"{gap:.2e}; expected at most {LARGEST_GAP:.0e}. This is a bug in the export: please report it."
        )
    return gap


def command_line() -> str:
    """How `tinker-hpc` is called here: by its path where no activated environment has it on PATH."""
    beside = Path(sys.executable).with_name("tinker-hpc")
    return "tinker-hpc" if shutil.which("tinker-hpc") or not beside.exists() else str(beside)


def summary(result: SftResult) -> Table:
    """Before and after, side by side."""
    table = Table("", "before", "after", title="sums it never trained on")
    table.add_row("loss, nats per answer token", f"{result.loss_before:.3f}", f"{result.loss_after:.3f}")
    table.add_row("right, and in the new form", f"{result.right_before:.0%}", f"{result.right_after:.0%}")
    table.add_row(f"one answer to\n{result.prompt}", result.sample_before, result.sample_after)
    return table


def main() -> None:
    """Command line entry. Exit code 1, with the reason, if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="results go to a new folder in here")
    arguments = parser.parse_args()
    console = Console()
    started = time.monotonic()
    try:
        if not BASE_MODEL.is_dir():
            raise ConfigError(
                f"the demo's model is not at {BASE_MODEL}: it is part of the repository, not of the installed package. "
                "Clone the repository and run `make demo` there."
            )
        run = tinker_hpc.submit(
            sft.train,
            str(BASE_MODEL),
            num_steps=arguments.steps,
            base_model=str(BASE_MODEL),
            cluster="local",
            name="demo",
        )
        console.print("A small model learns to answer sums as a ship's mate, with LoRA.")
        console.print(f"Submitted run [bold]{run.id}[/bold]; from another terminal:", soft_wrap=True)
        console.print(f"  {command_line()} status {run.id}", soft_wrap=True)
        try:
            watch(run, arguments.steps, console)
            result = run.result()
        except KeyboardInterrupt:
            run.cancel()
            raise
        out = arguments.out.resolve() / run.id
        adapter = export_peft(find_checkpoint(run.folder.data_root, result.adapter_path), out / "adapter")
        gap = check_adapter(BASE_MODEL, adapter, result)
    except TinkerHpcError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    curve = out / "loss.png"
    draw_losses(result.losses, result.loss_before, result.loss_after, curve)
    console.print(summary(result))
    console.print(f"loss curve    {curve}", soft_wrap=True)
    console.print(f"PEFT adapter  {adapter}", soft_wrap=True)
    console.print(
        f"              transformers + peft load it and agree: largest logprob difference {gap:.1e}", soft_wrap=True
    )
    console.print(f"resume from   {result.state_path}", soft_wrap=True)
    console.print(f"took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
