"""What pyproject.toml can't say: the presets stay in config/ here, and are pipeline/presets where this is installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pipeline", "pipeline.*", "cache"]), "pipeline.presets"],
    package_dir={"pipeline.presets": "config"},
    package_data={
        "pipeline.looking": ["templates/*.j2"],
        "pipeline.presets": ["*.yaml", "demo_teacher/*.json", "demo_teacher/*.safetensors", "demo_teacher/*.gz"],
    },
    exclude_package_data={"pipeline.presets": ["environment.yaml"]},
)
