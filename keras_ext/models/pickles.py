"""Evaluate a pickle without running what it asks for.

A pickle is a program for a machine with a stack and a memo. Most of its opcodes push constants
and fill lists, tuples and dicts; the others import names and call them, which is how a file
runs code. Here names are looked up in a table of ours and never imported, and what they stand
for is the table's: whatever else a pickle asks for is an error that names it.

`pickletools` of the standard library splits the bytes into opcodes and runs nothing. Nested
containers are built without recursion, and no two of them are ever compared or hashed.

Source: Lib/pickletools.py of CPython.
"""

import mmap
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),  # of Python 2
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
KEYS = (str, bytes, int, float, type(None))  # hashing a tuple recurses


class Refused(ValueError):
    """A pickle asks for what is not in the table, or for something that we do not read."""


class Damaged(ValueError):
    """Bytes are no pickle, or end early."""


@dataclass(frozen=True, eq=False)
class Function:
    """A name of the table that a pickle may call with arguments."""

    name: str
    call: Callable[..., Any]


class Ordered(dict):
    """A `collections.OrderedDict`: the only object that may get a state, which is dropped."""

    @classmethod
    def of(cls, items: Any = ()) -> "Ordered":
        """From a list of pairs, as Python 2 pickles it."""
        ordered = cls()
        for key, value in items:
            put(ordered, key, value)
        return ordered


def evaluate(
    file: IO[bytes] | mmap.mmap,
    known: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the pickle that starts here; the file stands after it then.

    Args:
        file: mapped, or of bytes in memory: others would make room for any length it claims.
        known: "module.name" -> what that means: a `Function` if it may be called, a str if it
            is refused by this description. Default: nothing.
        persistent: what a persistent id means. Default: there are none.

    Raises:
        Refused: the pickle asks for something that is not known.
        Damaged: this is no pickle, or only the start of one.

    Example:
        >>> import io
        >>> evaluate(io.BytesIO(b"(I1\\nI2\\nl."))
        [1, 2]
        >>> evaluate(io.BytesIO(b"cos\\nsystem\\n(S'rm *'\\ntR."))
        Traceback (most recent call last):
            ...
        keras_ext.models.pickles.Refused: it wants 'os.system'
    """
    machine = _Machine(known or {}, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(cast(IO[bytes], file)):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except Refused:
        raise
    # What damaged bytes lead to: an empty stack, no such entry of the memo, other arguments.
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def put(mapping: dict, key: Any, value: Any) -> None:
    """Set an item."""
    if not isinstance(key, KEYS):
        raise Refused(f"it has a key of type {type(key).__name__}")
    mapping[key] = value


class _Machine:
    """The stack, those below open marks, and the memo."""

    def __init__(
        self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says."""
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[opcode])
            case _ if opcode in LITERALS:
                stack.append(argument)
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP":
                stack.pop() if stack else self.marked()
            case "POP_MARK":
                self.marked()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack.append(tuple(stack.pop(-count + i) for i in range(count)))
            case "TUPLE" | "LIST":
                items = self.marked()
                self.stack.append(tuple(items) if opcode == "TUPLE" else items)
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self.extend([stack.pop()])
            case "APPENDS":
                self.extend(self.marked())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self.marked()
                self.stack.append({})
                self.update(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.update([key, value])
            case "SETITEMS":
                self.update(self.marked())
            case "GLOBAL":
                stack.append(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.find(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "BUILD":
                state, owner = stack.pop(), stack[-1]
                if not (isinstance(owner, Ordered) and isinstance(state, dict)):
                    raise Refused(f"it wants to set the state of {kind(owner)}")
            case "BINPERSID" if self.persistent:
                stack.append(self.persistent(stack.pop()))
            case "INST":
                raise Refused(f"it wants {argument.replace(' ', '.')[:100]!r}")
            case "OBJ" | "NEWOBJ" | "NEWOBJ_EX":
                raise Refused("it wants to make objects of a class")
            case _:  # extension codes, sets, buffers, persistent ids of text
                raise Refused(f"it has the opcode {opcode}, which checkpoints do not need")

    def marked(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f"it wants to append to {kind(self.stack[-1])}")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise Refused(f"it wants to set an item of {kind(self.stack[-1])}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            put(self.stack[-1], key, value)

    def find(self, module: Any, name: Any) -> Any:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("it wants what has no name")
        full = f"{module}.{name}"
        if full not in self.known:
            raise Refused(f"it wants {full[:100]!r}")
        value = self.known[full]
        if isinstance(value, str):
            raise Refused(f"it holds {value} ({full})")
        return value

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Function):
            raise Refused(f"it wants to call {kind(function)}")
        if not isinstance(arguments, tuple):
            raise Refused(f"it wants to call {function.name} with {kind(arguments)}")
        return function.call(*arguments)


def kind(value: Any) -> str:
    """A value by its type: it may be of any size."""
    return "None" if value is None else f"a value of type {type(value).__name__}"
