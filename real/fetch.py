"""
Downloads of data sets from their public homes: licence first, and only files with a known hash.

    python -m real.fetch semeval --accept_licence       into downloads/semeval
    python -m real.fetch expun --accept_licence         into downloads/expun
"""

import hashlib
import sys
import tarfile
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from common import InputError, atomic_write, command_line


class Source(NamedTuple):
    files: dict         # {URL: SHA-256 of the file; "" where none is known}
    licence: str        # what a user has to know and accept


EXPUN = "https://raw.githubusercontent.com/amazon-science/expunations/main/data/"
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
        {EXPUN + "expunations_annotated_full.json": "",
         EXPUN + "expunations_annotated_pilot_100.json": ""},
        "ExPUNations (Sun et al., EMNLP 2022, arXiv 2210.13513), Amazon: CC BY-NC 4.0, for\n"
        "non-commercial use, with attribution, and so are the models trained on it.\n"
        "It has no texts. They are SemEval's: fetch semeval, too."),
}


def download(url, path, sha256, retries=3):
    """Downloads a file unless it is there, and keeps it only if its hash is right.

    sha256: "" accepts any content. Raises InputError if it is not reached, or another file."""
    try:
        import pooch
    except ImportError:
        raise InputError("downloads need the pooch library: pip install pooch") from None
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(path.parent, base_url="", retry_if_failed=retries, urls={path.name: url},
                         registry={path.name: f"sha256:{sha256.lower()}" if sha256 else None})
    downloader = pooch.HTTPDownloader(timeout=30, progressbar=sys.stderr.isatty())
    try:
        store.fetch(path.name, downloader=downloader)
    except (OSError, ValueError) as error:      # requests' errors are OSErrors, a wrong hash is not
        raise InputError(f"{url}: nothing was kept: {error}") from None


def unpack(archive, folder):
    """Unpacks the XML, gold and licence files of a tar archive into data/test and data/trial.

    Files of other kinds are skipped, and no path of the archive leads outside the folder."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                wanted = path.suffix in (".xml", ".gold", ".dtd") or path.name in (
                    "LICENCE.md", "README.md")
                if not member.isfile() or not wanted:
                    continue
                in_data = path.parent.name in ("test", "trial")
                inner = Path("data", path.parent.name) if in_data else Path()
                with atomic_write(folder / inner / path.name) as temporary:
                    temporary.write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive}: cannot be unpacked: {error}") from None


def fetch(name: tyro.conf.Positional[Literal["semeval", "expun"]],
          out_dir: Path = Path("downloads"), accept_licence: bool = False,
          sha256: tuple[str, ...] = (), verify: bool = True):
    """Download a data set. Its licence is shown first and has to be accepted.

    sha256: hashes of the files, in order, instead of the known ones. verify: --no-verify accepts
    files without a check."""
    files, licence = SOURCES[name]
    print(licence, flush=True)
    if not accept_licence and not sys.stdin.isatty():
        raise InputError("nothing was downloaded: use --accept_licence if you accept the licence")
    if not accept_licence and input("Do you accept it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("nothing was downloaded: the licence was not accepted")
    hashes = list(sha256) or list(files.values())
    if len(hashes) != len(files):
        raise InputError(f"{name} consists of {len(files)} files, but --sha256 has {len(hashes)} "
                         "hashes")
    if verify and not all(hashes):
        raise InputError(f"no hash of {name} is known, so a download cannot be checked. Use "
                         "--no-verify, look at the files, and give the hashes that it prints to "
                         "--sha256 from then on")
    folder = out_dir / name
    for url, expected in zip(files, hashes, strict=True):
        path = folder / url.rpartition("/")[2]
        download(url, path, expected if verify else "")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        note = "as expected" if verify else "NOT checked"
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {found}, {note}")
        if ".tar" in path.name:
            unpack(path, folder)
    with atomic_write(folder / "LICENCE.txt") as temporary:
        temporary.write_text(licence + "\n", encoding="utf-8")
    print(f"next: python -m real.corpora {name} {folder} data/{name}")


if __name__ == "__main__":
    command_line(lambda: tyro.cli(fetch))
