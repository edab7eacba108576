"""The type checker that jaxtyping runs in tests: beartype, with ints accepted where floats are wanted."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
