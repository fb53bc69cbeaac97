"""The data sets: what is in them, how they are split and fed, and one line for whatever is missing or damaged."""

import hashlib
import json
import pickle
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.data import TextConfig, TokenDataset, standard_library_files, text_datasets
from tools import tokenize_text
from vision.images import ImageConfig, image_datasets, to_rgb

# ------------------------------------------------------------------------------------------------------------ helpers


@pytest.fixture
def refused(capsys):
    """Call something that must end with exit code 2 and one line on stderr, which says all of these patterns."""

    def check(*says, call):
        with pytest.raises(SystemExit) as ended:
            call()
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1, lines
        for pattern in says:
            assert re.search(pattern, lines[0]), lines[0]

    return check


def text(path=None, source="text", length=16, samples=0, vocabulary=256):
    return text_datasets(TextConfig(source, path and str(path), length, samples), vocabulary)


def images(source, path=None, **settings):
    return image_datasets(ImageConfig(source, path and str(path), **settings))


# --------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def embedded():
    return text()


def test_the_embedded_text_is_the_standard_library_split_by_file(embedded):
    train, validation = embedded
    assert len(train.tokens) > 3_000_000 and 0.05 < len(validation.tokens) / len(train.tokens) < 0.25
    parts = [train.tokens.tobytes(), validation.tokens.tobytes()]
    names = ("argparse.py", "ast.py", "bisect.py", "csv.py", "json/decoder.py", "heapq.py", "pickle.py", "sched.py",
             "shlex.py", "socket.py", "tarfile.py", "textwrap.py", "tokenize.py", "typing.py", "uuid.py")  # fmt: skip
    files = {file.as_posix(): file for file in standard_library_files()}
    found = [next(file for path, file in files.items() if path.endswith(f"/{name}")) for name in names]
    where = [[file.read_bytes() in part for part in parts] for file in found]
    assert all(sum(places) == 1 for places in where)  # whole, and in one of the two
    assert {tuple(places) for places in where} == {(True, False), (False, True)}


def test_the_split_is_the_same_every_time(embedded):
    fingerprints = [part.fingerprint() for part in embedded]
    assert fingerprints == [part.fingerprint() for part in text()]
    assert fingerprints[0] != fingerprints[1]


def test_samples_are_neighbouring_windows(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(200)))
    train, validation = text(tmp_path / "text.txt", length=16)
    assert len(train) == (180 - 1) // 16 and len(validation) == (20 - 1) // 16  # nine tenths, and the last one
    for index in range(len(train)):
        tokens, targets = train[index]
        assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape == (16,)
        assert tokens.tolist() == list(range(16 * index, 16 * index + 16))
        assert targets.tolist() == list(range(16 * index + 1, 16 * index + 17))
    assert validation[0][0].tolist() == list(range(180, 196))


def test_validation_samples_are_spread_over_the_set(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(10_001))
    everything = text(tmp_path / "text.txt", length=10)[1]
    assert list(everything.windows) == list(range(100))
    some = text(tmp_path / "text.txt", length=10, samples=8)[1]
    assert list(some.windows) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert len(text(tmp_path / "text.txt", length=10, samples=1000)[1]) == 100


def test_text_that_cannot_be_used(refused, tmp_path):
    refused("data.path = .*nothing.txt: no such", call=lambda: text(tmp_path / "nothing.txt"))
    (tmp_path / "short.txt").write_bytes(b"too short")
    refused("has [0-9] tokens", "sequence_length", call=lambda: text(tmp_path / "short.txt"))
    (tmp_path / "text.txt").write_bytes(bytes(1000))
    refused("vocabulary of 256, the model.* 100", call=lambda: text(tmp_path / "text.txt", vocabulary=100))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "tokens"}, "needs data.path"),
        ({"sequence_length": 0}, "sequence_length = 0 must be at least 1"),
        ({"validation_samples": -1}, "validation_samples = -1 0"),
    ],
)
def test_text_settings_that_cannot_work(settings, says):
    with pytest.raises(ValueError, match=says):
        TextConfig(**settings)


# ------------------------------------------------------------------------------------------------------- token folders


def tokenize(monkeypatch, *arguments):
    """What `python tools/tokenize_text.py …` does, in this process and without its progress bar."""
    monkeypatch.setattr(tokenize_text, "tqdm", lambda items, **_: items)
    monkeypatch.setattr(sys, "argv", ["tokenize_text.py", *map(str, arguments)])
    tokenize_text.main()


def test_the_command_makes_a_token_folder_of_bytes(tmp_path):
    words = "naïve café, 3 €\n" * 100
    (tmp_path / "book.txt").write_text(words, encoding="utf-8")
    command = [sys.executable, "tools/tokenize_text.py", "--input", tmp_path / "book.txt"]
    command = [*map(str, command), "--output", str(tmp_path / "tokens")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    count = len(words.encode())
    assert f"{count * 9 // 10:,} training tokens" in result.stdout
    assert f"--data.source tokens --data.path {tmp_path / 'tokens'} --model.vocabulary 256" in result.stdout

    train, validation = text(tmp_path / "tokens", "tokens", length=10)
    together = train.tokens.tobytes() + validation.tokens.tobytes()  # a single document: its last tenth validates
    assert together.decode() == words and len(train.tokens) == count * 9 // 10
    assert isinstance(train.tokens, np.memmap) and train.tokens.dtype == np.uint8
    assert bytes(train[2][0].tolist()) == words.encode()[20:30]


def test_a_hugging_face_tokenizer(monkeypatch, tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    documents = [f"Document {number}: the cat sat on the mat number {number}, naïvely.\n" for number in range(25)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    files = [tmp_path / f"{number:02}.txt" for number in range(25)]
    for file, document in zip(files, documents, strict=True):
        file.write_text(document)
    output = tmp_path / "tokens"
    tokenize(monkeypatch, "--tokenizer", tmp_path / "tokenizer", "--output", output, "--input", *files)

    size = tokenizer.get_vocab_size()
    assert 256 < size <= 300 and f"--model.vocabulary {size}" in capsys.readouterr().out
    train, validation = text(output, "tokens", length=4, vocabulary=size)
    assert train.tokens.dtype == np.uint16 and train.vocabulary == size
    end = tokenizer.token_to_id("<end>")
    for part, expected in (
        (train, [d for i, d in enumerate(documents) if i % 10 != 9]),
        (validation, [documents[9], documents[19]]),  # every tenth document
    ):
        ids = part.tokens.tolist()
        assert ids.count(end) == len(expected) and ids[-1] == end
        assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(d + "<end>" for d in expected)
        assert len(ids) < sum(len(document) for document in expected)  # merges were used: these are not bytes


def test_what_cannot_be_tokenized(refused, monkeypatch, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("some text " * 100)
    output = ("--output", tmp_path / "tokens")

    def call(*arguments):
        return lambda: tokenize(monkeypatch, *arguments)

    missing = tmp_path / "nothing.txt"
    refused("--input .*nothing.txt: no", call=call("--input", missing, *output))
    folder = tmp_path / "no" / "tokenizer"
    refused("--tokenizer .*no/tokenizer", call=call("--input", book, "--tokenizer", folder, *output))
    refused("--output .*book.txt/in", "write", call=call("--input", book, "--output", book / "in"))

    (tmp_path / "empty.txt").touch()
    refused("gives 0 training tokens and 0", call=call("--input", tmp_path / "empty.txt", *output))
    assert not list(tmp_path.glob("*tokens*")) and not list(tmp_path.glob(".tokens*"))


def test_a_token_folder_is_replaced_as_a_whole(refused, monkeypatch, tmp_path, token_folder):
    """Never without --overwrite, nothing if the command breaks off, and a training that reads the old one goes on."""
    (tmp_path / "book.txt").write_text("y" * 500)
    given = ("--input", tmp_path / "book.txt", "--output", token_folder)
    refused("exists already; choose another folder, or replace it", call=lambda: tokenize(monkeypatch, *given))
    running = text(token_folder, "tokens")[0]

    def breaks_off():
        yield "z" * 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_text.write_token_folder(breaks_off(), lambda text: list(text.encode()), 256, token_folder, "bytes")
    assert set(text(token_folder, "tokens")[0].tokens) == {ord("x")}
    tokenize(monkeypatch, *given, "--overwrite")
    assert set(text(token_folder, "tokens")[0].tokens) == {ord("y")}
    assert set(running.tokens) == {ord("x")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "tokens"]
    (token_folder / "notes.txt").touch()
    refused("holds notes.txt, which no token folder has", call=lambda: tokenize(monkeypatch, *given, "--overwrite"))


def test_a_tokenizer_that_gives_more_than_its_vocabulary(refused, tmp_path):
    write = tokenize_text.write_token_folder
    refused(
        "gives token 300, but has a vocabulary of 256",
        call=lambda: write(["a"], lambda _: [1] * 99 + [300], 256, tmp_path / "t", "odd"),
    )


@pytest.fixture
def token_folder(tmp_path):
    folder = tmp_path / "tokens"
    tokenize_text.write_token_folder(["x" * 1000], lambda text: list(text.encode()), 256, folder, "bytes")
    text(folder, "tokens")  # sound so far
    return folder


def edit_meta(**changes):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
        (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))

    return edit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: (folder / "validation.bin").unlink(),
            ": no validation.bin there.*python tools/tokenize_text.py",
        ),
        (lambda folder: (folder / "meta.json").unlink(), ": no meta.json there"),
        (lambda folder: (folder / "train.bin").write_bytes(b"x" * 899), "train.bin has 899 bytes, meta.json says 900"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json is not what"),
        (lambda folder: (folder / "meta.json").write_text("[1]"), "meta.json is not what"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json is not what"),
        (edit_meta(dtype="float7"), "meta.json is not what"),
        (edit_meta(dtype="uint16"), "train.bin has 900 bytes, meta.json says 900 .*uint16"),
        (edit_meta(tokens={"train": 900}), "meta.json is not what"),
        (edit_meta(vocabulary=None), "meta.json is not what"),
        (edit_meta(dtype="float64"), "meta.json is not what.*float64"),
        (edit_meta(dtype="O"), "meta.json is not what"),
        (edit_meta(vocabulary=0), "meta.json is not what"),
        (edit_meta(vocabulary=120), "train.bin has token 120, meta.json says a vocabulary of 120"),
        (edit_meta(tokens={"train": 900, "validation": 0}), "validation.bin has no tokens"),
        (
            lambda folder: (edit_meta(dtype="int8")(folder), (folder / "train.bin").write_bytes(b"\xfe" * 900)),
            "train.bin has token -2, meta.json says a vocabulary of 256",
        ),
        (edit_meta(vocabulary=1000), "vocabulary of 1000, the model.* 256"),
    ],
)
def test_damaged_token_folders(refused, token_folder, damage, says):
    damage(token_folder)
    refused(says, call=lambda: text(token_folder, "tokens"))


def test_a_missing_token_folder(refused, tmp_path):
    refused(r"no meta\.json, train\.bin, validation\.bin there", call=lambda: text(tmp_path / "nowhere", "tokens"))


# ---------------------------------------------------------------------------------------------------- embedded images


def test_digits():
    from sklearn.datasets import load_digits

    train, validation, classes = images("digits")
    assert (len(train), len(validation), classes) == (1438, 359, 10)
    whole = load_digits()
    for index in (0, 1, 358):
        picture, label = validation[index]
        expected = torch.from_numpy(whole.images[5 * index + 4]).float() / 8 - 1  # 0 … 16 becomes −1 … 1
        assert picture.shape == (1, 8, 8) and picture.dtype == torch.float32 and isinstance(label, int)
        torch.testing.assert_close(picture[0], expected)
        assert label == whole.target[5 * index + 4]
    pictures = {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert not pictures & {validation[i][0].numpy().tobytes() for i in range(len(validation))}
    assert train.fingerprint() == images("digits")[0].fingerprint() != validation.fingerprint()
    assert images("digits", image_size=16)[0][0][0].shape == (1, 16, 16)


# -------------------------------------------------------------------------------------------------------------- MNIST


def write_mnist(root, count):
    """MNIST's own format (IDX: big-endian sizes, then bytes); torchvision asks only that the files be there."""
    raw, generator = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    written = {}
    for part in ("train", "t10k"):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 0x0803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, count) + labels.tobytes())
        written[part] = pixels, labels
    return written


def test_mnist(tmp_path):
    written = write_mnist(tmp_path, 12)
    train, validation, classes = images("mnist", tmp_path)
    assert classes == 10
    for part, dataset in (("train", train), ("t10k", validation)):
        pixels, labels = written[part]
        assert len(dataset) == 12 and not dataset.augments  # a mirrored digit is another digit
        for index in (0, 11):
            picture, label = dataset[index]
            expected = (torch.from_numpy(pixels[index]).float() / 255 - 0.1307) / 0.3081
            assert picture.shape == (1, 28, 28) and label == labels[index]
            torch.testing.assert_close(torch.as_tensor(picture)[0], expected)


def test_missing_or_damaged_mnist(refused, tmp_path):
    fetch = r"python -c 'from torchvision.datasets import MNIST; MNIST\(\".*\", download=True\)'"
    refused("no MNIST there", fetch, call=lambda: images("mnist", tmp_path / "nowhere"))
    write_mnist(tmp_path, 12)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    for damaged in (file.read_bytes()[:-100], b"<html>not found</html>", b""):
        file.write_bytes(damaged)
        refused("or a damaged one", fetch, call=lambda: images("mnist", tmp_path))


# ----------------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """CIFAR-10's format: pickles of {data: (n, 3072) uint8, labels}, here of one training batch instead of five.

    torchvision accepts files by their MD5, which ours cannot have; so it is told the sums of ours. All else is real.
    """
    folder, generator = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    contents = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name in ("data_batch_1", "test_batch"):
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [i % 10 for i in range(20)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return tmp_path, contents


def test_cifar10(cifar10):
    folder, contents = cifar10
    train, validation, classes = images("cifar10", folder)
    assert (len(train), len(validation), classes) == (20, 20, 10)
    assert train.augments and not validation.augments and not images("cifar10", folder, augment=False)[0].augments
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262]))
    pixels = torch.from_numpy(contents["test_batch"]["data"][7]).view(3, 32, 32)
    picture, label = validation[7]
    assert label == 7 and picture.shape == (3, 32, 32)
    torch.testing.assert_close(torch.as_tensor(picture), (pixels / 255 - mean) / std)

    # Training: a 32 × 32 window of the picture in 4 pixels of black, or of its mirror image.
    original = torch.from_numpy(contents["data_batch_1"]["data"][3]).view(3, 32, 32)
    padded = (torch.nn.functional.pad(original, [4] * 4) / 255 - mean) / std
    windows = [p[:, y : y + 32, x : x + 32] for p in (padded, padded.flip(2)) for y in range(9) for x in range(9)]
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        picture = torch.as_tensor(train[3][0])
        match = [i for i, window in enumerate(windows) if torch.allclose(picture, window, atol=1e-6)]
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) > 6 and {place < 81 for place in seen} == {True, False}


def test_missing_or_damaged_cifar10(refused, cifar10, tmp_path):
    folder, _ = cifar10
    fetch = r"CIFAR10\(\".*\", download=True\)"
    refused("no CIFAR10 there", fetch, call=lambda: images("cifar10", tmp_path / "nowhere"))
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"other bytes")
    refused("or a damaged one", fetch, call=lambda: images("cifar10", folder))


# -------------------------------------------------------------------------------------------------------- image folders


def save_image(path, color, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def imagenet(tmp_path):
    """Two classes as ImageNet unpacks, of one color each; one picture is grey, as some of ImageNet's are."""
    for part, count in (("train", 3), ("val", 2)):
        for number in range(count):
            save_image(tmp_path / part / "n01" / f"{number}.JPEG", (255, 0, 0), size=(40 + number, 30))
            save_image(tmp_path / part / "n02" / f"{number}.JPEG", 51, size=(30, 50), mode="L")
    return tmp_path


def normalised(red, green, blue):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return [(value / 255 - m) / s for value, m, s in zip((red, green, blue), mean, std, strict=True)]


@pytest.mark.parametrize("augment", [True, False])
def test_a_folder_of_images_by_class(imagenet, augment):
    train, validation, classes = images("folder", imagenet, image_size=24, augment=augment)
    assert (len(train), len(validation), classes) == (6, 4, 2)
    assert train.augments == augment and not validation.augments
    for dataset in (train, validation):
        for index in range(len(dataset)):
            picture, label = dataset[index]
            assert picture.shape == (3, 24, 24) and picture.dtype == torch.float32
            assert label == index // (len(dataset) // 2)
            expected = torch.tensor(normalised(*((254, 0, 0), (51, 51, 51))[label]))  # JPEG knows no 255, 0, 0
            torch.testing.assert_close(picture.amax((1, 2)), expected, atol=0.02, rtol=0)
            torch.testing.assert_close(picture.amin((1, 2)), expected, atol=0.02, rtol=0)
    assert images("folder", imagenet)[1][0][0].shape == (3, 224, 224)


def test_tiny_imagenet(refused, tmp_path):
    for name, color in (("n01", (255, 0, 0)), ("n02", (0, 0, 255))):
        save_image(tmp_path / "train" / name / "images" / f"{name}_0.JPEG", color, (64, 64))
    for number, color in enumerate([(0, 0, 255), (255, 0, 0), (0, 0, 255)]):
        save_image(tmp_path / "val" / "images" / f"val_{number}.JPEG", color, (64, 64))
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("".join(f"val_{n}.JPEG\tn0{c}\t0\t0\t62\t62\n" for n, c in enumerate([2, 1, 2])))
    train, validation, classes = images("folder", tmp_path, image_size=64)
    assert (len(train), len(validation), classes) == (2, 3, 2)
    for dataset, labels in ((train, [0, 1]), (validation, [1, 0, 1])):
        found = [dataset[index] for index in range(len(dataset))]
        assert [label for _, label in found] == labels
        assert all(int(picture.mean((1, 2)).argmax()) == 2 * label for picture, label in found)  # red is 0, blue is 2
    # What only the evaluation reads is looked at before the first step.
    (tmp_path / "val" / "images" / "val_2.JPEG").write_bytes(b"")
    refused("val_2.JPEG cannot be read as an image", call=lambda: images("folder", tmp_path))
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    refused("line 2: image 'val_1.JPEG', which is not in ", call=lambda: images("folder", tmp_path))


def test_image_folders_that_cannot_be_used(refused, imagenet, tmp_path):
    def call(folder=imagenet):
        return lambda: images("folder", folder, image_size=24)

    refused("looked for train/CLASS", "val/CLASS", call=call(tmp_path / "nowhere"))
    (imagenet / "train" / "n03").mkdir()
    refused("not a tree of images by class", "n03", call=call())
    save_image(imagenet / "train" / "n03" / "0.JPEG", (0, 0, 0))
    refused(r"only in train \(1\): n03; expected folders of the same classes", call=call())
    (imagenet / "train" / "n03").rename(imagenet / "val" / "N01")
    refused(r"only in val \(1\): N01; expected", call=call())


@pytest.mark.parametrize(("text", "says"), [
    ("val_0.JPEG\tn99\t0\t0\t62\t62\n", "line 1: class 'n99', which train does not have"),
    ("\nval_0.JPEG n01 0 0 62 62\n", "line 2: no tab; expected NAME<tab>CLASS"),
    ("val_7.JPEG\tn01\n", "line 1: image 'val_7.JPEG', which is not in .*val/images"),
    ("../train/n01/0.JPEG\tn01\n", "line 1: image '../train/n01/0.JPEG', which is not in"),
    ("val_0.JPEG\tn01\nval_0.JPEG\tn02\n", "line 2: image 'val_0.JPEG', which stands above, too"),
    ("", "names no images"), ("\n\n", "names no images"), (b"\xff\xfe", "expected a text in UTF-8"),
])  # fmt: skip
def test_broken_annotations(refused, imagenet, text, says):
    save_image(imagenet / "val" / "images" / "val_0.JPEG", (0, 0, 0))
    (imagenet / "val" / "val_annotations.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused("val_annotations.txt", says, call=lambda: images("folder", imagenet, image_size=24))


def test_pictures_of_every_mode(tmp_path):
    """Each shows the same gray gradient as 8 bits do, or is refused; none becomes white or black."""
    gradient = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    gray = Image.fromarray(gradient)
    rgb = gray.convert("RGB")
    sixteen = Image.fromarray(gradient.astype(np.uint16) * 257)
    made = {
        "L.png": gray, "I16.png": sixteen, "I16.tiff": sixteen, "I16.pgm": sixteen, "RGB.png": rgb, "L.jpg": gray,
        "P.png": gray.convert("P"), "LA.png": gray.convert("LA"), "RGBA.webp": rgb.convert("RGBA"),
        "CMYK.tiff": rgb.convert("CMYK"),
    }  # fmt: skip
    for name, picture in made.items():
        picture.save(
            tmp_path / name, **({"quality": 100} if "jpg" in name else {"lossless": True} if "webp" in name else {})
        )
    rgb.save(tmp_path / "several.png", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    rgb.quantize(256).save(tmp_path / "transparent.png", transparency=bytes([255] * 255 + [0]))
    made |= {"several.png": rgb, "transparent.png": rgb}
    for name in made:
        with Image.open(tmp_path / name) as picture:
            found = np.asarray(to_rgb(picture)).astype(int)
        assert found.shape == (32, 32, 3)
        assert np.abs(found - gradient[:, :, None]).max() <= 2, name  # JPEG rounds
    for values in (np.float32, np.int32):
        Image.fromarray(gradient.astype(values) * 70000).save(tmp_path / "other.tiff")
        with Image.open(tmp_path / "other.tiff") as picture, pytest.raises(ValueError, match="of unknown range"):
            to_rgb(picture)


def test_an_unreadable_image_is_named(refused, imagenet):
    train = images("folder", imagenet, image_size=24)[0]
    path = imagenet / "train" / "n01" / "0.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    refused(f"{path} cannot be read as an image", call=lambda: train[0])
    path.unlink()
    refused(f"{path} cannot be read as an image", call=lambda: train[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "mnist"}, "data.source = mnist needs data.path"),
        ({"source": "folder"}, "data.source = folder needs data.path"),
        ({"workers": -1}, "data.workers = -1 must be 0 or more"),
        ({"image_size": 4}, "data.image_size = 4 at least 8"),
    ],
)
def test_image_settings_that_cannot_work(settings, says):
    with pytest.raises(ValueError, match=says):
        ImageConfig(**settings)


def test_the_fingerprint_tells_texts_of_one_length_apart():
    fingerprints = [TokenDataset(np.full(100, token, np.uint8), 9, 256).fingerprint() for token in (1, 2, 1)]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
