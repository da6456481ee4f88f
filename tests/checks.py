"""The runtime check of every annotation in imaginelens while the tests run (see pyproject.toml)."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as for type checkers (PEP 484).
typed = beartype(conf=BeartypeConf(is_pep484_tower=True))
