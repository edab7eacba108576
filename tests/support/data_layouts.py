"""Tiny data sets in the formats of the published archives: four pictures of three classes, in each split."""

import csv
import io
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

LABELS = [0, 1, 2, 1]


def shade(number: int) -> int:
    """The grey of a picture; numbers tell pictures apart in every format."""
    return 10 + 40 * number


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade(number),) * 3).save(path)


def text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def greys(side: int) -> np.ndarray:
    """(4, side, side, 3); the pixel at row 0, column 1 is one brighter, so that transposed pictures are told apart."""
    pixels = np.stack([np.full((side, side, 3), shade(i), np.uint8) for i in range(4)])
    pixels[:, 0, 1] += 1
    return pixels


def mat(path: Path, **variables) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables, do_compression=True)


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype("u1").tobytes())


def by_class(folder: Path, names) -> None:
    for number, label in enumerate(LABELS):
        picture(folder / str(names[label]) / f"{number}.png", number)


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did, in which CIFAR was published: text and bytes are both BINSTRING."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_binstring(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        head = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_binstring


def python2_pickle(path: Path, value) -> None:
    class Numpy1Pickler(Python2Pickler):
        def save_array(self, array):
            self.save_reduce(
                np._core.multiarray._reconstruct,
                (np.ndarray, (0,), b"b"),
                (1, array.shape, array.dtype, False, array.tobytes()),
                obj=array,
            )

        dispatch: ClassVar = Python2Pickler.dispatch | {np.ndarray: save_array}

    stream = io.BytesIO()
    Numpy1Pickler(stream, protocol=2).dump(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue().replace(b"numpy._core", b"numpy.core"))


def svhn(root: Path, split: str, names) -> None:
    mat(
        root / f"svhn/{split}_32x32.mat", X=greys(32).transpose(1, 2, 3, 0), y=np.array([[10], [1], [2], [1]], np.uint8)
    )


def gtsrb_test(root: Path, split: str, names) -> None:
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    rows += [f"{i:05d}.ppm;6;5;0;0;5;4;{label}" for i, label in enumerate(LABELS)]
    text(root / "gtsrb/GT-final_test.csv", rows)
    for number in range(4):
        picture(root / f"gtsrb/GTSRB/Final_Test/Images/{number:05d}.ppm", number)


def gtsrb_train(root: Path, split: str, names, folder="GTSRB/Training") -> None:
    for number, label in enumerate(LABELS):
        picture(root / f"gtsrb/{folder}/{label:05d}/{number:05d}_00000.ppm", number)
        text(root / f"gtsrb/{folder}/{label:05d}/GT-{label:05d}.csv", ["Filename;ClassId"])


def gtsrb_raw(root: Path, split: str, names) -> None:
    gtsrb_train(root, split, names, "GTSRB/Final_Training/Images")


def gtsrb_kaggle(root: Path, split: str, names) -> None:
    rows = ["Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path"]
    rows += [f"6,5,0,0,5,4,{label},Test/{i:05d}.png" for i, label in enumerate(LABELS)]
    text(root / "GTSRB/Test.csv", rows)
    for number in range(4):
        picture(root / f"GTSRB/Test/{number:05d}.png", number)


def cars(root: Path, split: str, names) -> None:
    base = root / "stanford_cars"
    kind = [("bbox_x1", "O"), ("bbox_y1", "O"), ("bbox_x2", "O"), ("bbox_y2", "O"), ("class", "O"), ("fname", "O")]
    rows = [(1, 1, 5, 4, label + 1, f"{number + 1:05d}.jpg") for number, label in enumerate(LABELS)]
    where = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}[split]
    mat(base / where, annotations=np.array([rows], kind).reshape(1, -1))
    mat(base / "devkit/cars_meta.mat", class_names=np.array([list(names)], object))
    for number in range(4):
        picture(base / f"cars_{split}/{number + 1:05d}.jpg", number)


def resisc45(root: Path, split: str, names) -> None:
    lines = []
    for number, label in enumerate(LABELS):
        name = names[label].replace(" ", "_")
        lines.append(f"{name}_{number:03d}.jpg")
        picture(root / f"resisc45/NWPU-RESISC45/{name}/{lines[-1]}", number)
    text(root / f"resisc45/resisc45-{split}.txt", lines)


def dtd_scripts(root: Path, split: str, names) -> None:
    by_class(root / f"dtd/{'val' if split == 'test' else split}", names)


def dtd_torchvision(root: Path, split: str, names) -> None:
    lines = [f"{names[label]}/{names[label]}_{number:04d}.jpg" for number, label in enumerate(LABELS)]
    text(root / f"dtd/dtd/labels/{split}1.txt", lines)
    for number, line in enumerate(lines):
        picture(root / "dtd/dtd/images" / line, number)


def eurosat(root: Path, split: str, names) -> None:
    by_class(root / f"EuroSAT_splits/{split}", ["AnnualCrop", "Forest", "HerbaceousVegetation"])


def sun397_scripts(root: Path, split: str, names) -> None:
    by_class(root / f"sun397/{split}", [f"{name[0]}_{name.replace(' ', '_')}" for name in names])


def sun397_raw(root: Path, split: str, names) -> None:
    folders = ["a/abbey", "a/airplane_cabin", "a/airport_terminal"]
    lines = [f"/{folders[label]}/sun_{number}.jpg" for number, label in enumerate(LABELS)]
    text(root / f"SUN397/Partitions/{split.title()}ing_01.txt", lines)
    for number, line in enumerate(lines):
        picture(root / "SUN397" / line[1:], number)


def idx_folder(root: Path, split: str, folder: str) -> None:
    prefix = {"train": "train", "test": "t10k"}[split]
    idx(root / folder / f"raw/{prefix}-images-idx3-ubyte", greys(28)[..., 0])
    idx(root / folder / f"raw/{prefix}-labels-idx1-ubyte", np.array(LABELS))


def mnist(root: Path, split: str, names) -> None:
    idx_folder(root, split, "MNIST")


def fashion_mnist(root: Path, split: str, names) -> None:
    idx_folder(root, split, "FashionMNIST")


def kmnist(root: Path, split: str, names) -> None:
    idx_folder(root, split, "KMNIST")


def emnist(root: Path, split: str, names) -> None:
    base = root / "EMNIST/raw"
    idx(base / f"emnist-letters-{split}-images-idx3-ubyte", greys(28)[..., 0].transpose(0, 2, 1))
    idx(base / f"emnist-letters-{split}-labels-idx1-ubyte", np.array(LABELS) + 1)
    idx(base / f"emnist-digits-{split}-labels-idx1-ubyte", np.array([9, 9]))


def cifar10(root: Path, split: str, names) -> None:
    base, rows = root / "cifar-10-batches-py", greys(32).transpose(0, 3, 1, 2).reshape(4, -1)
    parts = {"test": {"test_batch": slice(4)}, "train": {"data_batch_1": slice(2), "data_batch_2": slice(2, 4)}}
    for name, part in parts[split].items():
        entries = {"batch_label": name, "labels": LABELS[part], "data": rows[part]}
        python2_pickle(base / name, entries | {"filenames": [f"{i}.png" for i in LABELS[part]]})
    python2_pickle(base / "batches.meta", {"label_names": list(names), "num_vis": 3072})


def cifar100(root: Path, split: str, names) -> None:
    base, rows = root / "cifar-100-python", greys(32).transpose(0, 3, 1, 2).reshape(4, -1)
    python2_pickle(base / split, {"fine_labels": LABELS, "coarse_labels": [4, 4, 4, 4], "data": rows})
    python2_pickle(base / "meta", {"fine_label_names": list(names), "coarse_label_names": ["fish"]})


def stl10(root: Path, split: str, names) -> None:
    base = root / "stl10_binary"
    base.mkdir(exist_ok=True)
    (base / f"{split}_X.bin").write_bytes(greys(96).transpose(0, 3, 2, 1).tobytes())
    (base / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in LABELS))
    text(base / "class_names.txt", list(names))


def flowers(root: Path, split: str, names) -> None:
    base, chosen = root / "flowers-102", [9, 2, 5, 7]
    labels = np.full((1, 10), 3, np.uint8)
    labels[0, [number - 1 for number in chosen]] = [label + 1 for label in LABELS]
    mat(base / "imagelabels.mat", labels=labels)
    mat(base / "setid.mat", **{name: np.array([chosen], np.uint16) for name in ("trnid", "valid", "tstid")})
    for number, image in enumerate(chosen):
        picture(base / f"jpg/image_{image:05d}.jpg", number)


def pets(root: Path, split: str, names) -> None:
    base = root / "oxford-iiit-pet"
    files = [f"{names[label].capitalize()}_{number + 1}" for number, label in enumerate(LABELS)]
    lines = [f"{file} {label + 1} 1 1" for file, label in zip(files, LABELS, strict=True)]
    text(base / f"annotations/{'trainval' if split == 'train' else 'test'}.txt", lines)
    for number, file in enumerate(files):
        picture(base / f"images/{file}.jpg", number)


def pcam(root: Path, split: str, names) -> None:
    import h5py

    (root / "pcam").mkdir(exist_ok=True)
    for part, array in (("x", greys(96)), ("y", np.array(LABELS, np.uint8).reshape(-1, 1, 1, 1))):
        with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_{part}.h5", "w") as file:
            file.create_dataset(part, data=array, compression="gzip")


def fer2013_csv(root: Path, split: str, names) -> None:
    (root / "fer2013").mkdir(exist_ok=True)
    with (root / "fer2013/fer2013.csv").open("w", newline="") as file:
        write = csv.writer(file)
        write.writerow(["emotion", "pixels", "Usage"])
        for number, pixels in enumerate(greys(48)[..., 0]):
            usage = "Training" if split == "train" else ("PublicTest", "PrivateTest")[number // 2]
            write.writerow([LABELS[number], " ".join(map(str, pixels.ravel())), usage])
        write.writerow([6, " ".join(["0"] * 48 * 48), {"test": "Training", "train": "PublicTest"}[split]])


def fer2013_folders(root: Path, split: str, names) -> None:
    by_class(root / f"fer2013/{split}", ["angry", "disgust", "fear"])


def food101(root: Path, split: str, names) -> None:
    base = root / "food-101"
    lines = [f"{names[label].replace(' ', '_')}/{number}" for number, label in enumerate(LABELS)]
    text(base / f"meta/{split}.txt", lines)
    for number, line in enumerate(lines):
        picture(base / f"images/{line}.jpg", number)


def rendered_sst2(root: Path, split: str, names) -> None:
    by_class(root / f"rendered-sst2/{split}", names)
