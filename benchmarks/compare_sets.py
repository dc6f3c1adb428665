"""`regraft compare` on hymenoptera and clothing10, and the plot of both in the README.

    python benchmarks/compare_sets.py --out runs/compare

MobileNetV1 × 0.25 with ImageNet weights, on photos of 96 pixels, so that a core does it in an hour; 5, 10, 20 and all
images of each class, three seeds. It goes on where it was stopped. `--data` holds the two folders; `--weights` is the
ImageNet checkpoint of bubbliiiing/retinaface-pytorch.
"""

import argparse
from pathlib import Path

import regraft
from regraft.report.comparison_page import write_comparison_plot

ROOT = Path(__file__).resolve().parents[1]
MODEL = "py:examples/mobilenet_v1.py:MobileNetV1"  # run in the root of the repository
SETS = ("hymenoptera", "clothing10")


def main() -> None:
    """Compare, print the answers, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights/mobilenetV1X0.25_pretrain.tar"))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--ways", nargs="+", default=["scratch", "probe", "lp-ft", "gradual", "all"])
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/compare.svg")
    arguments = parser.parse_args()
    comparisons = []
    for name in arguments.sets:
        result = regraft.compare(
            MODEL,
            arguments.data / name,
            weights=str(arguments.weights),
            trust_code=True,
            image_size=96,
            epochs=16,
            seeds=arguments.seeds,
            ways=arguments.ways,
            out=arguments.out / name,
        )
        regraft.write_report(result, arguments.out / name / "report.html")
        comparisons.append((name, result))
        print(name, result.machine, f"{result.seconds / 60:.0f} minutes", result.once, sep="\n")
        print("| images a class |", " | ".join(way.title for way in result.ways), "|")
        for images in result.images:
            cells = []
            for way in result.ways:
                runs = result.results(way.name, images)
                cells.append(f"{sum(run.accuracy for run in runs) / len(runs):.3f}")
            print(f"| {images} |", " | ".join(cells), "|")
        print(*(claim.text for claim in result.claims), sep="\n")
    print(write_comparison_plot(comparisons, arguments.plot))


if __name__ == "__main__":
    main()
