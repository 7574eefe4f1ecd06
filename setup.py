"""Says what is shipped and what it needs. Pins of the tested environment are in requirements/, these are ranges."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

CORE = [
    "torch>=2.6",  # tensors, SVD, autograd
    "safetensors>=0.4.3",  # the file format that is read and written
    "numpy>=1.26",  # safetensors writes torch tensors through it
    "tqdm>=4.66",  # progress of long runs
    "rich>=13.7",  # tables on the terminal
    "threadpoolctl>=3.5",  # one thread of numpy's BLAS for each of ours
    "constriction>=0.5,<0.6",  # the entropy coder of packed files
    "vl-convert-python>=1.8",  # Vega-Lite: the charts of reports
]
TRAIN = [  # what sd-scripts imports on the way to its first step; without them the core still compresses files
    "accelerate>=0.33",
    "diffusers>=0.25",
    "einops>=0.7",
    "ftfy>=6.1",  # CLIP's tokenizer cleans captions with it
    "huggingface-hub>=0.24",
    "imagesize>=1.4.1",
    "opencv-python-headless>=4.8",
    "pillow>=10",
    "tensorboard>=2.15",  # --log_with tensorboard
    "toml>=0.10.2",  # configuration files are read with the parser of sd-scripts
    "torchvision",
    "transformers>=4.44",
    "voluptuous>=0.13.1",
]
EVALUATE = [  # what `resize_lora_ext.py evaluate` draws and measures pictures with
    "diffusers>=0.25",
    "peft>=0.13",  # diffusers loads LoRA of SDXL, SD3 and FLUX through it
    "pillow>=10",
    "torch-fidelity>=0.3,<0.5",  # Inception with the weights that FID is defined by
    "transformers>=4.44",  # CLIP, DINOv2
]
GUI = ["gradio>=6.31,<7"]  # the page of `resize_lora_ext.py gui`; in earlier ones it loads a script from cdnjs.cloudflare.com
FAST = ["numba>=0.60"]  # decodes large entropy-coded files faster
DEV = [
    "hypothesis",
    "mypy",
    "numba",
    "peft",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
    "torchmetrics",
    "types-toml",
    "wheel",
]

# The two scripts of the root, as soon as they exist.
SCRIPTS = [name for name in ("train_network_ext", "resize_lora_ext") if (ROOT / f"{name}.py").is_file()]

setup(
    name="lora-compress",
    version="0.1.0",
    description="Prunes and quantizes LoRA weights, while they train with sd-scripts or afterwards",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `networks` and `library` are named by hand: they must not have an __init__.py, so that sd-scripts' folders of the same names
    # stay importable (networks/sd_scripts_path.py joins them), and find_packages sees only folders that have one.
    packages=[*find_packages(include=["lora_compress", "lora_compress.*"]), "networks", "library"],
    package_data={"lora_compress": ["py.typed", "**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.toml"]},
    py_modules=SCRIPTS,
    install_requires=CORE,
    extras_require={"train": TRAIN, "evaluate": EVALUATE, "gui": GUI, "fast": FAST, "dev": TRAIN + DEV},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
