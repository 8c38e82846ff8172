"""Draw docs/images/h200.png from the GPU results: python benchmarks/plots.py (extra ``plot``)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "nvidia-h200"
IMAGE = HERE.parent / "docs" / "images" / "h200.png"
KINDS = {"fp8": "#999999", "dense": "#7aa6c2", "6:8": "#0072b2", "2:4": "#d55e00"}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    measured = json.loads((RESULTS / "inference.json").read_text())["rows"]
    rows = [r for r in measured if r["model"] == "qwen2.5-7b" and r["head"] == "bf16"]
    shown = {
        "prefill": sorted((r for r in rows if r["stage"] == "prefill"), key=_tokens),
        "decode": sorted((r for r in rows if r["stage"] == "decode"), key=_tokens),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axis, (stage, cases) in zip(axes, shown.items(), strict=True):
        for offset, (kind, colour) in enumerate(KINDS.items()):
            places = [i + 0.2 * (offset - 1.5) for i in range(len(cases))]
            axis.bar(places, [r["over_bf16"][kind] for r in cases], 0.18, label=kind, color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        labels = [
            f"{r['batch']} × {r['length']}" if stage == "prefill" else r["batch"] for r in cases
        ]
        axis.set_xticks(range(len(cases)), labels)
        axis.set_xlabel("prompts × tokens" if stage == "prefill" else "sequences")
        axis.set_title(f"{stage}, {cases[0]['model']}")
    axes[0].set_ylabel("times BF16")
    axes[0].legend(frameon=False)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=110)


def _tokens(row: dict) -> tuple[int, int]:
    return row["batch"] * (row["length"] if row["stage"] == "prefill" else 1), row["batch"]


if __name__ == "__main__":
    main()
