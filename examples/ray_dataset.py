"""Generation as a stage of a Ray Data job of one's own: `python examples/ray_dataset.py`."""

import ray

from diffray.pipelines import ProcessorConfig, build_processor

ray.init(include_dashboard=False)
processor = build_processor(
    ProcessorConfig(defaults={"steps": 20}, should_continue_on_error=True),
    preprocess=lambda row: {"prompt": f"a large {row['colour']} {row['shape']}", "label": row["shape"]},
)
things = [{"colour": colour, "shape": shape} for colour in ("red", "blue") for shape in ("circle", "star")]
processor(ray.data.from_items(things)).write_parquet("out/ray_dataset")
