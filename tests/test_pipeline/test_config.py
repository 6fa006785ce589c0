import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, RunConfig, load_config
from stages.config import TrainConfig
from stages.training.recipes import resolve_settings

STUDY = """
name = "toy"
work = "runs/toy"

[[sets]]
name = "train"
role = "id-train"
images = "data/train"

[[sets]]
name = "textures.v2"
role = "far-ood"
images = "sklearn:photos"

[[variants]]
name = "dense"
set = { "train.experts" = 1, "train.grouping" = "groups.json" }
"""


@pytest.fixture
def study(tmp_path):
    """Write an experiment file: the toy study, or the toy study with more at its end."""

    def write(more: str = "", text: str = STUDY) -> Path:
        path = tmp_path / "toy.toml"
        path.write_text(text + more, "utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}{os.sep}", "")


def test_defaults_and_absolute_paths(study, tmp_path):
    config = load_config(study())
    assert config.work == tmp_path / "runs/toy"
    assert config.cache.root == tmp_path / "runs/toy/cache"
    assert [entry.images for entry in config.sets] == [str(tmp_path / "data/train"), "sklearn:photos"]
    assert config.seeds == (0,)
    assert config.backbone.weights == "hub"
    assert config.finetune is None
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_variants_change_train_and_nothing_else(study, tmp_path):
    variants = load_config(study(), ["train.epochs=3"]).variant_configs()
    assert list(variants) == ["default", "dense"]
    assert variants["default"].experts == "auto"
    assert variants["dense"].experts == 1
    assert variants["dense"].epochs == 3
    assert variants["dense"].grouping == str(tmp_path / "groups.json")


def test_a_variants_preset_is_below_what_train_gives_and_not_below_its_defaults(study):
    variants = load_config(
        study("\n[[variants]]\nname = 'paper'\nset = { train.preset = 'paper' }\n"), ["train.lr=1e-5"]
    ).variant_configs()
    settings = resolve_settings(variants["paper"], 4)
    assert (settings.lr, settings.epochs) == (1e-5, resolve_settings(TrainConfig(preset="paper"), 4).epochs)


def test_what_is_recorded_gives_the_same_study(study):
    config = load_config(study("[finetune]\njoint = 0\n"), ["train.preset=paper", "train.epochs=8"])
    said = config.to_dict()
    assert (said["train"]["epochs"], said["train"]["lr"], said["finetune"]["epochs"]) == (8, None, None)
    again = RunConfig.model_validate(json.loads(json.dumps(said)))
    assert again.to_dict() == said
    assert resolve_settings(again.train, 4) == resolve_settings(config.train, 4)


def test_variant_keys_without_quotes_mean_the_same(study):
    path = study("\n[[variants]]\nname = 'two'\nset = { train.experts = 2 }\n")
    assert load_config(path).variant_configs()["two"].experts == 2


def test_a_variant_may_have_fewer_seeds(study):
    path = study("seeds = [2, 0]\n\n[[variants]]\nname = 'static'\nset = { train.mixup = 'static' }\n")
    config = load_config(path, ["seeds=[0, 1, 2]"])
    assert config.variant_seeds() == {"default": (0, 1, 2), "dense": (2, 0), "static": (0, 1, 2)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.expert=adapter",
            'trains copies of the backbone\'s end, and train.expert = "adapter" is another kind of expert: give '
            '"end" there, others as [[variants]]',
        ),
        ("train.start=probe", 'its experts start at zero: give train.start = "probe" to [[variants]] alone'),
        ("cache.patches=pool:4", 'its experts read all patches: give cache.patches = "full", not "pool:4"'),
    ],
)
def test_experts_that_cannot_be_trained_with_the_backbone_are_refused(study, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(study(), ["finetune.joint=1", override])
    assert str(error.value) == f"--set finetune.joint: {message}"


def test_a_variant_may_not_have_the_name_of_the_jointly_trained_one(study):
    path = study("\n[[variants]]\nname = 'joint'\nset = { train.experts = 2 }\n")
    load_config(path)
    with pytest.raises(ConfigError, match=r"variants\.joint: .* finetune\.joint"):
        load_config(path, ["finetune.joint=1"])


def test_variants_on_fine_tuned_features(study):
    path = study("seeds = [2, 0]\n\n[[variants]]\nname = 'static'\nset = { train.mixup = 'static' }\n")
    tuned = ["seeds=[0, 1, 2]", "finetune.seeds=[0, 1]"]

    def variants(*more):
        return load_config(path, [*tuned, *more]).variant_seeds("finetuned")

    assert variants() == {"default": (0, 1), "dense": (0,), "static": (0, 1)}
    assert variants("finetune.seeds=[1]", 'finetune.variants=["dense", "static"]') == {"static": (1,)}
    assert variants("finetune.variants=[]") == {}
    assert variants("finetune.variants=[]", "finetune.joint=2") == {"joint": (0, 1)}
    assert load_config(path, [*tuned, "finetune.joint=2"]).variant_seeds() == {
        "default": (0, 1, 2), "dense": (2, 0), "static": (0, 1, 2)
    }  # fmt: skip


def test_set_takes_literals_text_and_names_of_entries(study, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(
        study(),
        [
            "train.epochs=5",
            "seeds=[0, 1]",
            "train.mixup=static",
            "sets.textures.v2.images=b.tar",  # a name with a dot; the path is relative to the current folder
            "variants.dense.set.train.experts=2",
            "finetune.epochs=1",
            'score.scores=["knn"]',
        ],
    )
    assert (config.train.epochs, config.seeds, config.train.mixup) == (5, (0, 1), "static")
    assert config.sets[1].images == str(elsewhere / "b.tar")
    assert config.variant_configs()["dense"].experts == 2
    assert config.finetune is not None
    assert config.score.scores == ["knn"]


@settings(deadline=None)  # two busy cores
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
    | st.just("a#b")
    | st.just("1, x = 2")
    | st.just("2024-01-01")
)
def test_any_text_can_be_given_in_quotes(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "quoted.toml"
    path.write_text(STUDY, "utf-8")
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON text is TOML text, but for this
    assert load_config(path, [f"name={quoted}"]).name == text


@settings(deadline=None)  # two busy cores
@given(st.text(st.characters(codec="utf-8")))
def test_any_override_is_taken_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(STUDY, "utf-8")
    for override in (text, f"train.lr={text}", f"sets.{text}=1"):
        with suppress(ConfigError):
            load_config(path, [override])


@pytest.mark.parametrize("text", ["a#1", "1, x = 2", "2024-01-01", "1 # comment", "runs/x", "5}, y = {"])
def test_what_is_no_literal_is_text(study, text):
    assert load_config(study(), [f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=0", "--set train.epochs: 0 given, must be greater than 0"),
        ('train.epochs="20"', '--set train.epochs: "20" given, must be a valid integer'),
        ("train.epochs=true", "--set train.epochs: true given, must be a valid integer"),
        ("train.experts=0", "--set train.experts: 0 given, must be greater than 0 or 'auto'"),
        ("train.lr=nan", "--set train.lr: NaN given, must be a finite number"),
        ("train.mixup=strong", "--set train.mixup: \"strong\" given, must be 'dynamic', 'static' or 'none'"),
        ("train.epoch=3", "--set train.epoch: unknown key; did you mean 'epochs'?"),
        ("trian.epochs=3", "--set trian: unknown key; did you mean 'train'?"),
        ("split.q=3", "--set split.q: unknown key; known: val"),
        ("split.val=1", "--set split.val: 1 given, must be less than 1"),
        ("train=3", "--set train: 3 given, must be a table"),
        ("sets=3", "--set sets: 3 given, must be a list"),
        (
            "finetune.seeds=[3]",
            "--set finetune.seeds: [3] given, must be one or more different numbers of the study's seeds [0]",
        ),
        (
            'finetune.variants=["defualt"]',
            "--set finetune.variants: \"defualt\" is not a variant; did you mean 'default'?",
        ),
        ("seeds=[]", "--set seeds: [] given, must be one or more different numbers"),
        ("seeds=[1, 1]", "--set seeds: [1, 1] given, must be one or more different numbers"),
        ("seeds=[0, -1]", "--set seeds #2: -1 given, must be greater than or equal to 0"),
        ("work=", '--set work: "" given, must be a path'),
        ("cache.expert_blocks=0", "--set cache.expert_blocks: 0 given, must be greater than 0"),
        (
            "cache.patches=pool:0",
            "--set cache.patches: \"pool:0\" given, must be 'full', 'none' or 'pool:G' with G at least 1",
        ),
        ("score.k=0", "--set score.k: 0 given, must be greater than 0 or 'auto'"),
        ('score.scores=["kn"]', "--set score.scores: \"kn\" is not a known score; did you mean 'knn'?"),
        (
            'score.scores=["auto+knn"]',
            '--set score.scores: "auto+knn" given, but auto is chosen as a whole, and no part of a sum',
        ),
        (
            'score.scores=["frozen:knn"]',
            '--set score.scores: "frozen:knn" given, which reads nothing that experts make: "knn" says the same',
        ),
        (
            'score.scores=["knn+msp", "msp+knn"]',
            '--set score.scores: ["knn+msp", "msp+knn"] given, must be one or more different names',
        ),
        ("backbone.image_size=4097", "--set backbone.image_size: 4097 given, must be less than or equal to 4096"),
        ('score.scores=["knn+kn"]', "--set score.scores: \"kn\" is not a known score; did you mean 'knn'?"),
        ("score.params.enrgy.temperature=2", "--set score.params.enrgy: unknown key; did you mean 'energy'?"),
        ("score.params.energy.temperature=0", "--set score.params.energy.temperature: 0 given, must be greater than 0"),
        (
            "score.params.energy.temprature=2",
            "--set score.params.energy.temprature: unknown setting; did you mean 'temperature'?",
        ),
        ("score.params.energy=2", "--set score.params.energy: 2 given, must be a table"),
        ("score.profile=openod", "--set score.profile: \"openod\" given, must be 'paper', 'openood' or 'pytorch-ood'"),
        ("score.scores=[]", "--set score.scores: [] given, must be one or more different names"),
        ("train.epochs", "--set train.epochs: must be key=value, such as train.epochs=5"),
        ("work.x=1", "--set work.x: work is a single value, it has no keys"),
        (
            "sets.tran.images=a",
            "--set sets.tran.images: must be <list>.<name>.<key> with the name of an entry; did you mean 'train'?",
        ),
        (
            "variants.dense.set.train.expets=1",
            "--set variants.dense.set.train.expets: unknown key; did you mean 'experts'?",
        ),
    ],
)
def test_override_refused(study, override, message):
    assert refusal(study(), override) == message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[train]\nepochs = 0", "toy.toml: train.epochs: 0 given, must be greater than 0"),
        ("[train]\nepochs = 0\nlr = 0\nx = 1", "toy.toml: train.x: unknown key; known: experts, "),
        ("[[sets]]\nrole = 'id-test'\nimages = 'a'", "toy.toml: sets #3.name: missing"),
        ("[[sets]]\nname = 'a/b'\nrole = 'id-test'\nimages = 'a'", 'toy.toml: sets.a/b.name: "a/b" given, must be '),
        ("[[sets]]\nname = 'average'\nrole = 'id-test'\nimages = 'a'", "toy.toml: sets.average: this name is a word"),
        ("[[sets]]\nname = 'id'\nrole = 'near-ood'\nimages = 'a'", "toy.toml: sets.id: this name is a word"),
        (
            "".join(f"[[sets]]\nname = '{name}'\nrole = 'id-test'\nimages = 'a'\n" for name in "ab"),
            "toy.toml: sets: 2 sets have role id-test, must be at most one",
        ),
        ("[[sets]]\nname = 'train'\nrole = 'id-test'\nimages = 'a'", "toy.toml: sets.train: two sets have this name"),
        ("[[sets]]\nname = 'a'\nrole = 'id-train'\nimages = 'a'", "toy.toml: sets: 2 sets have role id-train, must be"),
        (
            "[[sets]]\nname = 'a'\nrole = 'ood'\nimages = 'a'",
            "toy.toml: sets.a.role: \"ood\" given, must be 'id-train'",
        ),
        ("[[sets]]\nname = 'a'\nrole = 'id-test'", "toy.toml: sets.a.images: missing"),
        (
            "[[sets]]\nname = 'a'\nrole = 'id-test'\nfeatures = 'a.npz'",
            "toy.toml: sets.a.origin: missing; say in your words which network, weights and size gave these features",
        ),
        (
            "[[sets]]\nname = 'a'\nrole = 'id-test'\nfeatures = 'a.npz'\norigin = 'x'",
            'toy.toml: sets.a.origin: "x" given, but set train has images: to show that both come from one',
        ),
        (
            "[[sets]]\nname = 'a'\nrole = 'id-test'\nfeatures = 'a.npz'\norigin = ''",
            'toy.toml: sets.a.origin: "" given, must have at least 1 character',
        ),
        (
            "[[sets]]\nname = 'a'\nrole = 'id-test'\nimages = 'a'\nfeatures = 'a.npz'",
            "toy.toml: sets.a: has images and features; give one of them",
        ),
        (
            "[[sets]]\nname = 'a'\nrole = 'id-test'\nimages = 'a'\norigin = 'x'",
            "toy.toml: sets.a.origin: says where features come from; this set has images",
        ),
        (
            "[[variants]]\nname = 'default'\nset = {}",
            "toy.toml: variants.default: two variants have this name (default",
        ),
        (
            "[[variants]]\nname = 'k'\nset = { score.k = 1 }",
            "toy.toml: variants.k.set.score.k: a variant changes [train] alone",
        ),
        (
            "[[variants]]\nname = 'k'\nset = { train.experts = 0 }",
            "toy.toml: variants.k.set.train.experts: 0 given, must be greater than 0 or 'auto'",
        ),
        (
            "[[variants]]\nname = 'k'\nset = {}\nseeds = [0, 3]",
            "toy.toml: variants.k.seeds: [0, 3] given, must be one or more different numbers of the study's seeds [0]",
        ),
        ("[[variants]]\nname = 'k'\nset = {}\nseeds = []", "toy.toml: variants.k.seeds: [] given, must be one or more"),
        (
            "[[variants]]\nname = 'k'\nset = {}\nscores = ['knn', 'mos']",
            'toy.toml: variants.k.scores: ["knn", "mos"] given, must be one or more different names of score.scores',
        ),
        ("[[variants]]\nname = 'k'\nset = {}\nscores = []", "toy.toml: variants.k.scores: [] given, must be one or"),
        (
            "[[variants]]\nname = 'k'\nset = {}\nscores = ['knn', 'knn']",
            'toy.toml: variants.k.scores: ["knn", "knn"] given',
        ),
        ("[[variants]]\nname = 'k'\nset = {}\nseeds = [0, 0]", "toy.toml: variants.k.seeds: [0, 0] given, must be one"),
        ("[[variants]]\nname = 'k'\nset = {}\nseeds = 0", "toy.toml: variants.k.seeds: 0 given, must be a list"),
        (
            "[train]\nalpha_min = 0.5\nalpha_max = 0.5",
            "toy.toml: train.alpha_min: 0.5 given, must be below alpha_max = 0.5",
        ),
        ("[train]\nalpha_max = 0.1", "toy.toml: train.alpha_min: 0.1 given, must be below alpha_max = 0.1"),
        (
            '[finetune]\nbeta = "dynamic"\nalpha_min = 0.8',
            "toy.toml: finetune.alpha_min: 0.8 given, must be below alpha_max = 0.8",
        ),
        (
            "[[variants]]\nname = 'k'\nset = { train.alpha_min = 0.9 }",
            "toy.toml: variants.k.set.train.alpha_min: 0.9 given, must be below alpha_max = 0.8",
        ),
        ("[backbone]\nmean = [0.5, 0.5]", "toy.toml: backbone.mean: [0.5, 0.5] given, must have 3 values"),
        ("x = [}", "toy.toml: not valid TOML: Invalid value (at line "),
    ],
)
def test_file_refused(study, more, message):
    assert refusal(study(more)).startswith(message)


def test_all_problems_are_counted(study):
    assert refusal(study("[train]\nepochs = 0\nlr = 0\nx = 1")).endswith("(and 2 more)")


def test_no_train_set(study):
    text = 'name = "toy"\nwork = "runs"\nsets = []\n'
    assert refusal(study(text=text)) == "toy.toml: sets: 0 sets have role id-train, must be exactly one"


def test_what_is_missing_at_the_top(study):
    assert refusal(study(text="")) == "toy.toml: name: missing (and 2 more)"


def test_unreadable_files(tmp_path):
    assert refusal(tmp_path / "no.toml") == "no.toml: No such file or directory; give the experiment's TOML file"
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "image.toml").write_bytes(b"\xff\xd8\xff\xe0")
    assert refusal(tmp_path / "image.toml") == "image.toml: not a text file in UTF-8; give the experiment's TOML file"


def test_file_with_byte_order_mark(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf" + STUDY.encode())
    assert load_config(tmp_path / "bom.toml").name == "toy"


def test_scoring_needs_test_sets(study):
    config = load_config(study())
    config.require_roles("extract")
    with pytest.raises(ConfigError, match=r"^sets: score .* id-test"):
        config.require_roles("score")
    test_set = "[[sets]]\nname = 'test'\nrole = 'id-test'\nimages = 'a'"
    load_config(study(test_set)).require_roles("score")


# ------------------------------------------------------------------------------------------------- data and extends


def test_data_is_what_the_paths_of_sets_are_relative_to(study, tmp_path, monkeypatch):
    path = study(text='data = "images"\n' + STUDY)
    config = load_config(path)
    assert [entry.images for entry in config.sets] == [str(tmp_path / "images/data/train"), "sklearn:photos"]
    assert config.work == tmp_path / "runs/toy"  # is no part of it
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(path, ["data=elsewhere", "sets.textures.v2.images=mine"])
    images = [str(tmp_path / "here/elsewhere/data/train"), str(tmp_path / "here/mine")]
    assert [entry.images for entry in config.sets] == images
    assert config.data == tmp_path / "here/elsewhere"


def test_a_pattern_of_shards_is_a_path_like_any_other(study, tmp_path, monkeypatch):
    path = study(text=STUDY.replace("data/train", "data/{a,b}/train-{0000..0146}.tar"))
    assert load_config(path).sets[0].images == str(tmp_path / "data/{a,b}/train-{0000..0146}.tar")
    monkeypatch.chdir(tmp_path)
    for pattern in ("other/t-{00..14}.tar", "{a,b}.tar", "[ab]-*.tar", "**/*.tar"):
        assert load_config(path, [f"sets.train.images={pattern}"]).sets[0].images == str(tmp_path / pattern)


def test_a_list_may_have_its_root_below_data_and_its_classes_beside_the_file(study, tmp_path):
    text = 'data = "d"\n' + STUDY.replace('"data/train"', '"lists/a.txt"\nroot = "images"\nclasses = "some.txt"')
    (train, _) = load_config(study(text=text)).sets
    assert [train.images, train.root, train.classes] == [
        str(tmp_path / part) for part in ("d/lists/a.txt", "d/images", "some.txt")
    ]
    assert train.source == f"{train.images}, its paths below {train.root}, the classes of {train.classes}"


def test_a_list_may_say_which_columns_count(study):
    text = STUDY.replace('"data/train"', '"a.csv"\npath_column = "where"\nlabel_column = "breed"')
    (train, _) = load_config(study(text=text)).sets
    assert (train.path_column, train.label_column) == ("where", "breed")
    assert train.source == f"{train.images}, paths in 'where', classes in 'breed'"
    assert 'label_column: "" given' in refusal(study(text=text.replace("breed", "")))


@pytest.mark.parametrize("key", ["root", "path_column", "label_column"])
def test_root_and_columns_of_lists_are_for_images(study, key):
    text = STUDY.replace('images = "sklearn:photos"', f'features = "mine.npz"\norigin = "o"\n{key} = "x"')
    assert f"sets.textures.v2.{key}: is for images" in refusal(study(text=text))


def test_a_study_may_extend_another(study, tmp_path):
    study()
    child = tmp_path / "below" / "child.toml"
    child.parent.mkdir()
    child.write_text('extends = "../toy.toml"\nname = "child"\nwork = "runs"\n[train]\nepochs = 3\n')
    config, parent = load_config(child), load_config(tmp_path / "toy.toml")
    assert (config.name, config.work, config.train.epochs) == ("child", child.parent / "runs", 3)
    assert config.cache.root == child.parent / "runs" / "cache"
    assert (config.sets, config.variants) == (parent.sets, parent.variants)
    child.write_text(child.read_text() + "[cache]\npatches = 'none'\n")
    (tmp_path / "toy.toml").write_text('data = "d"\n' + STUDY + "[cache]\nexpert_blocks = 2\n")
    config = load_config(child)
    assert (config.cache.patches, config.cache.expert_blocks) == ("none", 2)  # tables are merged
    assert config.sets[0].images == str(tmp_path / "d/data/train")
    assert load_config(child, [f"data={tmp_path / 'e'}"]).sets[0].images == str(tmp_path / "e/data/train")


def test_what_cannot_be_extended_is_refused(study, tmp_path):
    assert "extends: 3 given, must be the path of an experiment file" in refusal(study(text="extends = 3\n"))
    assert "extends this file; a file cannot extend itself" in refusal(study(text='extends = "toy.toml"\n'))
    assert 'extends: "nowhere.toml" given, there is no such file beside it' in refusal(
        study(text='extends = "nowhere.toml"\n')
    )


FEATURES = """
name = "given"
work = "runs"

[[sets]]
name = "train"
role = "id-train"
features = "train.npz"
origin = "dinov2-b14@518"

[[sets]]
name = "test"
role = "id-test"
features = "test.npz"
origin = "dinov2-b14@518"
"""


def test_a_study_of_features_names_no_backbone(study):
    config = load_config(study(text=FEATURES))
    assert config.has_features
    assert config.backbone is None
    assert config.sets[0].features == str(study(text=FEATURES).parent / "train.npz")
    assert load_config(study()).backbone.name == "vit_small_patch14_dinov2.lvd142m"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("[finetune]", "toy.toml: finetune: needs images; set train has features"),
        ("[cache]\npatches = 'none'", "toy.toml: cache.patches: says what to keep of images; of set train all is kept"),
        (
            "[[sets]]\nname = 'o'\nrole = 'far-ood'\nfeatures = 'o.npz'\norigin = 'clip'",
            'toy.toml: sets.o.origin: "clip" given, but set train has "dinov2-b14@518": features of different',
        ),
    ],
)
def test_a_study_of_features_refused(study, more, message):
    assert refusal(study(text=FEATURES + more)).startswith(message)
