"""The table of verbs. The parser, the help and the completion scripts are all made from it."""

from collections.abc import Callable, Iterable

from suture.cli import actions
from suture.cli.catalogue import catalogue
from suture.cli.grammar import Argument, Key, Option, Verb, true_or_false

SHELLS = ("bash", "zsh", "fish")


def _choices(key: str) -> Callable[[], Iterable[str]]:
    """The values of a key, as the code that reads it has them."""
    return lambda: catalogue().choices[key]


def _analysis_keys() -> tuple[Key, ...]:
    """The keys that the analyses declare, each with the names of those that take it."""
    keys = catalogue().analysis_keys.items()
    return tuple(Key(name, f"{', '.join(key.analyses)}: {key.explanation}", key.default) for name, key in keys)


_HYDRA = (
    Option("--multirun", "run every combination of the values that keys have, with commas between them", short="-m"),
    Option(
        "--cfg",
        "print the configuration and stop: job, hydra or all",
        "PART",
        "-c",
        values=("job", "hydra", "all"),
        text=True,
    ),
    Option("--resolve", "with --cfg: fill in what refers to other keys"),
    Option("--package", "with --cfg: print only this part of the configuration, such as method", "KEY", "-p"),
)

_PLAN = Option("--plan", "print bytes, passes, memory and time on this machine, and do nothing else")

_BASE = Key("base", "the pretrained model", path=True)
_MODELS = Key("models.NAME", "a fine-tuned model, under a name of your choice; once for each model", path=True)

_TABLE = (
    Verb(
        "run",
        "Merge the models of a pool, repair and score the result",
        "suture run method=ties_merging modelpool=glyphs8 taskpool=glyphs8 output=out",
        actions.run,
        details="The word run may be left out. The folder holds the merged model and a report. With -m, every "
        "combination of values runs, as in method.scaling_factor=0.1,0.3. Names that start with hydra: only "
        "hydra.sweep.dir, hydra.sweep.subdir, and the launchers and sweepers that are installed (hydra/launcher=NAME, "
        "hydra/sweeper=NAME) with their settings.",
        options=(*_HYDRA, _PLAN),
        configuration="config",
    ),
    Verb(
        "check",
        "Check the models, tasks and disk space of a run",
        "suture check method=ties_merging modelpool=glyphs8 taskpool=glyphs8",
        actions.check,
        details="Files are checked without a pool, as suture merge takes them: base=… models.NAME=… with method=… and "
        "output=… alone.",
        forwarded=(_BASE, _MODELS),
        configuration="config",
        method="simple_average",
    ),
    Verb(
        "evaluate",
        "Score the models of a pool, and one of your own, on every task",
        "suture evaluate modelpool=glyphs8 taskpool=glyphs8 matrix=true",
        actions.evaluate,
        unused=("method", "repair"),
        keys=(
            Key("model", "one more model to score: the path of a checkpoint", path=True),
            Key("matrix", "every model on every task; with output=FOLDER a report too", "false", values=true_or_false),
        ),
        options=(_PLAN,),
        configuration="config",
        method="simple_average",
    ),
    Verb(
        "search",
        "Search for a method's best knobs, and run it with them",
        "suture search method=tsv_m method.alpha=1,2 modelpool=glyphs8 taskpool=glyphs8",
        actions.search,
        details="The knobs to search are keys of the method with several values, as in method.threshold=10,20,40, or "
        "with an interval, as in method.scaling_factor=0.1..1. Points are scored on inputs set aside, without labels "
        "unless score=accuracy; the best is run as by suture run. An interrupted search resumes when the same command "
        "is given again.",
        keys=(
            Key(
                "sampler",
                "how points are chosen; by default grid for lists, sobol for intervals",
                values=_choices("sampler"),
            ),
            Key("trials", "the number of points, unless they are a grid"),
            Key("score", "how points are compared", values=_choices("score")),
            Key("split", "the split whose inputs are scored", values=_choices("split")),
            Key("num_inputs", "the number of inputs of each task"),
            Key("groups", "the number of scales to search, from the first block to the last"),
        ),
        options=(_PLAN,),
        configuration="config",
        defaults=lambda: catalogue().search_defaults,
    ),
    Verb(
        "merge",
        "Merge checkpoint files of any size, in bounded memory",
        "suture merge base=llama models.a=org/math models.b=lora method=dare output=out",
        actions.merge,
        details="The output is a model directory that transformers loads: sharded safetensors, configuration, "
        "tokenizer, model card, hashes of the inputs. Inputs are files, model directories, hub ids or folders of LoRA "
        "adapters. An interrupted merge continues when the same command is given again.\n\n"
        "A knob is one value, a gradient over the layers (method.scaling_factor=[0.2,0.5]), or a list of filters: "
        "'method.scaling_factor=[{filter:mlp,value:0.5},{value:0.3}]'",
        forwarded=(
            _BASE,
            _MODELS,
            Key("mergekit", "a mergekit YAML file, in place of base, models and method", path=True),
            Key("output", "a new folder for the merged model", path=True, required=True),
        ),
        options=(
            Option("--plan", "", key="plan"),
            Option("--shard", "", "i/n", key="shard"),
            Option("--device", "", "DEVICE", key="device"),
            Option("--launcher", "do the merge in shares: local, slurm or ray", "NAME"),
            Option("--shards", "with --launcher: the number of shares", "N"),
        ),
        configuration="merging",
    ),
    Verb(
        "transplant",
        "Give a model the tokenizer of another",
        "suture transplant org/model org/donor --output out",
        actions.transplant,
        details="Tokens that both have keep the model's rows in embedding and head. Every other row is a sum of a few "
        "of these: the one that comes nearest to it in the donor (orthogonal matching pursuit).",
        arguments=(
            Argument("MODEL", "the model that gets a tokenizer", path=True),
            Argument("DONOR", "the model whose tokenizer it gets", path=True),
        ),
        options=(
            Option("--output", "a new folder for the model", "FOLDER"),
            Option("--atoms", "the most tokens in a sum; by default 64", "N"),
            Option("--memory", "the most that the search holds; by default 300MB", "SIZE"),
            Option("--overwrite", "replace an output folder that exists"),
        ),
    ),
    Verb(
        "analyse",
        "Compare the models of a pool",
        "suture analyse interpolation modelpool=glyphs8 taskpool=glyphs8 points=0,0.5,1",
        actions.analyse,
        details="similarity, layers and trimming look at the weights; interpolation, landscape and bias need a "
        "taskpool=… too. The table is printed and, with the figure, written into a folder, output=…",
        unused=("repair",),
        arguments=(Argument("ANALYSIS", "the analysis to run", values=lambda: catalogue().analyses),),
        keys=(
            Key("models", "names of models of the pool, with commas between them; by default all"),
            Key("model", "bias: the path of a merged model; by default the method merges one", path=True),
        ),
        configuration="config",
        method="simple_average",
        found_keys=_analysis_keys,
    ),
    Verb(
        "report",
        "Write the page of a finished run again, or compare several runs",
        "suture report out/ties out/adamerging --output comparison.html",
        actions.report,
        arguments=(Argument("RUN", "the folder of a finished run", many=True, path=True),),
        options=(
            Option("--output", "the page to write; by default in the run's folder", "PAGE"),
            Option("--still", "pictures in place of interactive figures"),
        ),
    ),
    Verb(
        "push",
        "Upload the model of a finished run to the hub",
        "suture push out/ties org/merged-model --private",
        actions.push,
        details="The merged model, its model card and its repair modules go up in one commit. Files that name places "
        "on this machine stay here.",
        arguments=(
            Argument("RUN", "the folder of a finished run, or of a merge of files", path=True),
            Argument("NAME", "the repository on the hub: org/name"),
        ),
        options=(
            Option("--private", "if the repository is new, for its owners only"),
            Option("--revision", "the branch to commit to", "BRANCH"),
        ),
    ),
    Verb(
        "reproduce",
        "List published figures and their commands, or check a run",
        "suture reproduce --check out/ties",
        actions.reproduce,
        options=(
            Option("--list", "list the figures, the default"),
            Option("--check", "compare a finished run; exit code 1 if it is outside the tolerance", "RUN"),
        ),
    ),
    Verb(
        "methods",
        "List the methods and repairs, or explain one and its knobs",
        "suture methods ties_merging",
        actions.methods,
        arguments=(Argument("METHOD", "the method or repair to explain", required=False),),
        options=(Option("--all", "every knob of every method and repair"),),
    ),
    Verb(
        "init",
        "Write the YAML files of your models and data, from their folders",
        "suture init models data --output my-merge",
        actions.init,
        details="The folders, and those in them, are searched for models and data; nothing is loaded. models.yaml "
        "and tasks.yaml say what was found and what to fill in.",
        arguments=(Argument("FOLDER", "folders of models and of data", many=True, path=True),),
        options=(
            Option("--output", "where to write; by default here", "FOLDER"),
            Option("--base", "the pretrained model; by default the one whose name says so", "PATH"),
            Option("--family", "the family; by default by the pretrained model's configuration", "NAME"),
        ),
    ),
    Verb(
        "pools",
        "List the pools of models and of tasks that ship",
        "suture pools",
        actions.pools,
    ),
    Verb(
        "zoo",
        "List the example models, and how to get those that do not ship",
        "suture zoo",
        actions.zoo,
        arguments=(Argument("NAME", "only these", required=False, many=True),),
    ),
    Verb(
        "demo",
        "Merge, calibrate and repair the eight example experts",
        "suture demo --output demo",
        actions.demo,
        options=(
            Option("--output", "a new folder; by default outputs/demo/TIME", "FOLDER"),
            Option("--full", "AdaMerging too, with final and deep surgery"),
            Option("--overwrite", "replace an output folder that exists"),
        ),
    ),
    Verb(
        "completion",
        "Print a completion script for bash, zsh or fish",
        "source <(suture completion bash)",
        actions.completion,
        details="The script holds all names of the version that printed it. To load it in every new shell:\n\n"
        "  suture completion bash > ~/.local/share/bash-completion/completions/suture\n"
        "  suture completion zsh > ~/.zfunc/_suture\n"
        "  suture completion fish > ~/.config/fish/completions/suture.fish\n\n"
        "zsh needs fpath+=~/.zfunc before compinit in ~/.zshrc.",
        arguments=(Argument("SHELL", "the shell", required=False, values=lambda: SHELLS),),
        text=True,
    ),
    Verb(
        "help",
        "Explain one verb, or list them all",
        "suture help merge",
        actions.explain,
        arguments=(Argument("VERB", "the verb to explain", required=False, values=lambda: tuple(VERBS)),),
        text=True,
    ),
)

#: Every verb by its name, in the order of the help.
VERBS: dict[str, Verb] = {verb.name: verb for verb in _TABLE}
