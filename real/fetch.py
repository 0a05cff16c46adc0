"""
Downloads of data sets from their public homes: license first, and only the files that are meant.

    python -m real.fetch semeval --accept_licence       into downloads/semeval
    python -m real.fetch expun --accept_licence         into downloads/expun

A file is known by its SHA-256, or by the git commit in its address.
"""

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from common import InputError, command_line, write_text


class Source(NamedTuple):
    files: dict         # {URL: SHA-256 of the file, None if the commit in the URL fixes it}
    licence: str        # what a user has to know and accept


EXPUN = ("https://raw.githubusercontent.com/amazon-science/expunations/"
         "8ca1f404d288d8621f63d4b66239c44ade91dcbc/data/")
SOURCES = {
    # Two users of the archive published this hash (of 748,424 bytes) independently of each other.
    "semeval": Source(
        {"https://alt.qcri.org/semeval2017/task7/data/uploads/semeval2017_task7.tar.xz":
            "70e82d89a102fced7dd1b1db90daa4ead55357d399d23f4d99e888634b4f4d0a"},
        "SemEval-2017 task 7 (Miller, Hempelmann, Gurevych 2017, aclanthology.org/S17-2005).\n"
        "The collection is CC BY 4.0, UKP Lab, TU Darmstadt; 1,138 of its puns come from\n"
        "PunoftheDay.com and are CC BY-NC 4.0, other parts are CC BY 4.0. Together: for\n"
        "non-commercial use, with attribution, and so are the models trained on it.\n"
        "LICENCE.md beside the data has the details."),
    "expun": Source(
        {EXPUN + "expunations_annotated_full.json": None,
         EXPUN + "expunations_annotated_pilot_100.json": None},
        "ExPUNations (Sun et al., EMNLP 2022, arXiv 2210.13513), Amazon: CC BY-NC 4.0, for\n"
        "non-commercial use, with attribution, and so are the models trained on it.\n"
        "It has no texts. They are SemEval's: fetch semeval, too."),
}


def download(url, path, sha256):
    """Downloads a file unless it is there, tries again, and keeps it only if its hash is right.

    sha256: None accepts any content. Raises InputError if it is not reached, or another file."""
    try:
        import pooch
    except ImportError:
        raise InputError("downloads need the pooch library: pip install pooch") from None
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(path.parent, base_url="", retry_if_failed=3, urls={path.name: url},
                         registry={path.name: sha256 and f"sha256:{sha256}"})
    downloader = pooch.HTTPDownloader(timeout=30, progressbar=sys.stderr.isatty())
    try:
        store.fetch(path.name, downloader=downloader)
    except (OSError, ValueError) as error:      # requests' errors are OSErrors, a wrong hash is not
        raise InputError(f"{url}: nothing was kept: {error}") from None


def fetch(name: tyro.conf.Positional[Literal["semeval", "expun"]],
          out_dir: Path = Path("downloads"), accept_licence: bool = False):
    """Download a data set. Its license is shown first and has to be accepted."""
    files, licence = SOURCES[name]
    print(licence, flush=True)
    if not accept_licence and not sys.stdin.isatty():
        raise InputError("nothing was downloaded: use --accept_licence if you accept the license")
    if not accept_licence and input("Do you accept it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was downloaded: the license was not accepted")
    folder = out_dir / name
    for url, sha256 in files.items():
        path = folder / url.rpartition("/")[2]
        download(url, path, sha256)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {found}")
        if ".tar" in path.name:
            shutil.unpack_archive(path, folder, filter="data")     # nothing outside the folder
    write_text(folder / "LICENCE.txt", licence + "\n")
    print(f"as records: python -m real.corpora {name} {folder} {folder}/records")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(fetch))
