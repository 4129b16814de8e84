"""A batch job from Python, with the config of a job file: `python examples/python_job.py`. Run it again after a
crash, and it goes on."""

from diffray.pipelines import JobConfig, Workers, for_this_terminal, run

config = JobConfig(
    input="examples/prompts.csv",
    output="out/python_job",
    images_per_prompt=2,
    defaults={"steps": 20},
    workers=Workers(actors=1),
)
result = run(config, progress=for_this_terminal())
print(f"{result.images} images, {result.rejected} rejected rows in {result.output}")
