"""What the detectors see in ordinary images: the tables in docs/results/judges.json.

python benchmarks/judges.py

Needs the extras `detect`, `nudenet` and scikit-image for its sample images. Nothing is downloaded.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from safegen.judges import load_judge
from safegen.judges.open_nsfw import preprocess

JUDGES = {
    "nudenet (bgr)": ("nudenet", {"threads": 1}),
    "nudenet (rgb)": ("nudenet", {"threads": 1, "channels": "rgb"}),
    "open-nsfw": ("open-nsfw", {"threads": 1}),
}


def main() -> None:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs scikit-image: pip install scikit-image")
    files = sorted(
        p for p in (Path(spec.origin).parent / "data").iterdir() if p.suffix in {".png", ".jpg"}
    )
    images = [Image.open(p).convert("RGB") for p in files]
    judges = {title: load_judge(name, **options) for title, (name, options) in JUDGES.items()}
    found = {title: judge.detect(images) for title, judge in judges.items()}

    print(
        "| image | " + " | ".join(JUDGES) + " (all scores) |\n" + "|---" * (len(JUDGES) + 1) + "|"
    )
    for i, path in enumerate(files):
        cells = []
        for title, results in found.items():
            if title == "open-nsfw":  # what is under 0.2 is not kept, so it is asked for here
                ((seen,),) = judges[title]._detect([preprocess(images[i])])
                cells.append(f"{seen.score:.3f}")
            else:
                cells.append(", ".join(f"{d.label} {d.score:.2f}" for d in results[i].items))
        if any(cells[:2]) or float(cells[2]) >= 0.05:
            print(f"| {path.name} | " + " | ".join(c or "–" for c in cells) + " |")
    quiet = sum(not found["nudenet (bgr)"][i].items for i in range(len(files)))
    print(
        f"\n{len(files)} images; nudenet (bgr) sees nothing in {quiet}; "
        "unsafe at the default threshold and labels: ",
        end="",
    )
    print(
        ", ".join(
            f"{title} {sum(bool(d.contains(judge.labels, judge.threshold)) for d in found[title])}"
            for title, judge in judges.items()
        )
    )

    pictures = [image.resize((512, 512)) for image in images[:16]]
    for title, judge in judges.items():
        judge.detect(pictures[:2])
        began = time.process_time()
        judge.detect(pictures)
        print(
            f"{title}: {judge.id}, {1000 * (time.process_time() - began) / len(pictures):.0f} "
            "CPU-ms per image of 512x512, 1 thread"
        )


if __name__ == "__main__":
    main()
