"""
Downloads of data sets from their public homes: pinned by hash, resumable, licence first.

    python data.py fetch semeval --accept_licence      into downloads/semeval
    python data.py fetch expun   --accept_licence      into downloads/expun
"""

import hashlib
import http.client
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from tqdm import tqdm

from common import InputError, replacing


class Source(NamedTuple):
    files: dict          # {URL: SHA-256 of what it must give; '' where nobody has pinned it yet}
    licence: str         # what one has to know and accept before using it


EXPUN = "https://raw.githubusercontent.com/amazon-science/expunations/main/data/expunations_annotated_"
SOURCES = {
    # This checksum (of 748,424 bytes) is the one that two users of the archive published independently of each other.
    "semeval": Source(
        {"https://alt.qcri.org/semeval2017/task7/data/uploads/semeval2017_task7.tar.xz":
            "70e82d89a102fced7dd1b1db90daa4ead55357d399d23f4d99e888634b4f4d0a"},
        "SemEval-2017 task 7 (Miller, Hempelmann, Gurevych 2017, aclanthology.org/S17-2005): the collection is CC BY 4.0,\n"
        "UKP Lab, TU Darmstadt; 1,138 puns come from PunoftheDay.com and are CC BY-NC 4.0, other parts CC BY 4.0. Together:\n"
        "for non-commercial use, with attribution. The same holds for models trained on it. Details: LICENCE.md beside the data."),
    "expun": Source(
        {EXPUN + "full.json": "", EXPUN + "pilot_100.json": ""},
        "ExPUNations (Sun et al., EMNLP 2022, arXiv 2210.13513), Amazon: CC BY-NC 4.0, for non-commercial use, with attribution.\n"
        "The same holds for models trained on it. It has no texts: they are SemEval's, fetch these too."),
}


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def receive(url, part, timeout):
    """One attempt to get what is missing of `part`. True if it is complete, False if the connection was cut."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise InputError(f"{url}: the server sent another range than the one asked for")
            if response.status != 206:
                have = 0                                # it sends the whole file again
            size = response.headers.get("Content-Length")
            total = have + int(size) if size else None
            with part.open("ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, desc=url.rpartition("/")[2], unit="B", unit_scale=True, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
                while chunk := response.read1(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                return total is None or file.tell() == total
    except urllib.error.HTTPError as error:
        if error.code == 416:                           # nothing comes after what is there: it is complete, or of another file
            return True
        if error.code < 500 and error.code != 429:
            raise InputError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}", file=sys.stderr)
    return False


def download(url, path, sha256="", retries=5, timeout=30, wait=1.0):
    """Gets a file, goes on where a cut left off (in this call or a later one), and puts it in place only if its hash is right.

    sha256: '' checks nothing. Raises InputError if the server cannot be reached, or the hash is wrong."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, size = 0, -1
    while not receive(url, part, timeout):
        now = part.stat().st_size if part.exists() else 0
        failures, size = (0 if now > size >= 0 else failures + 1), now      # any progress earns new patience
        if failures > retries:
            raise InputError(f"{url}: gave up after {retries} retries; the same command goes on from what has come so far, {part}")
        time.sleep(wait * 2 ** failures)
    found = sha256_of(part)
    if sha256 and found != sha256.lower():
        part.unlink()
        raise InputError(f"{url}: has the SHA-256 {found}, not {sha256}: it was damaged or has changed, and was not kept")
    part.replace(path)
    return found


def unpack(archive, folder):
    """The XML, gold and licence files of a tar archive, in data/test and data/trial; nothing else, nothing outside `folder`."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                place = Path(member.name)
                if member.isfile() and (place.suffix in (".xml", ".gold", ".dtd") or place.name in ("LICENCE.md", "README.md")):
                    inner = Path("data", place.parent.name) if place.parent.name in ("test", "trial") else Path()
                    with replacing(folder / inner / place.name) as temporary:
                        temporary.write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive}: cannot be unpacked: {error}") from None


def fetch(name: tyro.conf.Positional[Literal["semeval", "expun"]], out_dir: Path = Path("downloads"), accept_licence: bool = False,
          sha256: tuple[str, ...] = (), verify: bool = True):
    """Download a data set. Shows its licence, which has to be accepted first.
    sha256: to check the files against, in their order, instead of the pinned ones. verify: --no-verify takes them unchecked."""
    files, licence = SOURCES[name]
    print(licence, flush=True)
    if not accept_licence:
        if not sys.stdin.isatty():
            raise InputError("nothing was downloaded: say --accept_licence if you accept this licence")
        if input("Do you accept this licence? [y/N] ").strip().lower() not in ("y", "yes"):
            raise InputError("nothing was downloaded: the licence was not accepted")
    pins = list(sha256) or list(files.values())
    if len(pins) != len(files):
        raise InputError(f"{name} consists of {len(files)} files, --sha256 names {len(pins)} checksums")
    if verify and not all(pins):
        raise InputError(f"no checksum of {name} is pinned in fetch.py, so what the server sends cannot be checked. Get it with "
                         f"--no-verify, look at it, and give the {len(files)} checksums that it prints to --sha256 from then on")
    for url, pin in zip(files, pins, strict=True):
        path = out_dir / name / url.rpartition("/")[2]
        if path.exists() and (not verify or sha256_of(path) == pin.lower()):
            print(f"{path}: is there already, SHA-256 {sha256_of(path)}")
        else:
            found = download(url, path, pin if verify else "")
            checked = "as it must be" if verify else "NOT checked against anything"
            print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {found}, {checked}")
        if ".tar" in path.name:
            unpack(path, out_dir / name)
    with replacing(out_dir / name / "LICENCE.txt") as temporary:
        temporary.write_text(licence + "\n", encoding="utf-8")
    print(f"look at it: python data.py show {out_dir / name}" + (f" --semeval {out_dir / 'semeval'}" if name == "expun" else ""))
