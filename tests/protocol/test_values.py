"""Numbers and names against the specification's section "Values"."""

import pickle
from enum import IntEnum, IntFlag
from typing import Any

import pytest

from pynbd.protocol import values
from pynbd.protocol.values import (
    ClientFlag,
    Command,
    CommandFlag,
    Error,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    ReplyFlag,
    ReplyType,
    State,
    TransmissionFlag,
)

# Copied by hand from the specification; flags by the number of their bit.
NUMBERS: dict[type[IntEnum], str] = {
    Option: "1 NBD_OPT_EXPORT_NAME 2 NBD_OPT_ABORT 3 NBD_OPT_LIST 4 NBD_OPT_PEEK_EXPORT "
    "5 NBD_OPT_STARTTLS 6 NBD_OPT_INFO 7 NBD_OPT_GO 8 NBD_OPT_STRUCTURED_REPLY "
    "9 NBD_OPT_LIST_META_CONTEXT 10 NBD_OPT_SET_META_CONTEXT 11 NBD_OPT_EXTENDED_HEADERS",
    OptionReply: "1 NBD_REP_ACK 2 NBD_REP_SERVER 3 NBD_REP_INFO 4 NBD_REP_META_CONTEXT "
    "0x80000001 NBD_REP_ERR_UNSUP 0x80000002 NBD_REP_ERR_POLICY 0x80000003 NBD_REP_ERR_INVALID "
    "0x80000004 NBD_REP_ERR_PLATFORM 0x80000005 NBD_REP_ERR_TLS_REQD "
    "0x80000006 NBD_REP_ERR_UNKNOWN 0x80000007 NBD_REP_ERR_SHUTDOWN "
    "0x80000008 NBD_REP_ERR_BLOCK_SIZE_REQD 0x80000009 NBD_REP_ERR_TOO_BIG "
    "0x8000000a NBD_REP_ERR_EXT_HEADER_REQD",
    Info: "0 NBD_INFO_EXPORT 1 NBD_INFO_NAME 2 NBD_INFO_DESCRIPTION 3 NBD_INFO_BLOCK_SIZE",
    Command: "0 NBD_CMD_READ 1 NBD_CMD_WRITE 2 NBD_CMD_DISC 3 NBD_CMD_FLUSH 4 NBD_CMD_TRIM "
    "5 NBD_CMD_CACHE 6 NBD_CMD_WRITE_ZEROES 7 NBD_CMD_BLOCK_STATUS 8 NBD_CMD_RESIZE",
    ReplyType: "0 NBD_REPLY_TYPE_NONE 1 NBD_REPLY_TYPE_OFFSET_DATA 2 NBD_REPLY_TYPE_OFFSET_HOLE "
    "5 NBD_REPLY_TYPE_BLOCK_STATUS 6 NBD_REPLY_TYPE_BLOCK_STATUS_EXT "
    "0x8001 NBD_REPLY_TYPE_ERROR 0x8002 NBD_REPLY_TYPE_ERROR_OFFSET",
    Error: "1 NBD_EPERM 5 NBD_EIO 12 NBD_ENOMEM 22 NBD_EINVAL 28 NBD_ENOSPC 75 NBD_EOVERFLOW "
    "95 NBD_ENOTSUP 108 NBD_ESHUTDOWN",
}
BITS: dict[type[IntFlag], str] = {
    HandshakeFlag: "0 NBD_FLAG_FIXED_NEWSTYLE 1 NBD_FLAG_NO_ZEROES",
    ClientFlag: "0 NBD_FLAG_C_FIXED_NEWSTYLE 1 NBD_FLAG_C_NO_ZEROES",
    TransmissionFlag: "0 NBD_FLAG_HAS_FLAGS 1 NBD_FLAG_READ_ONLY 2 NBD_FLAG_SEND_FLUSH "
    "3 NBD_FLAG_SEND_FUA 4 NBD_FLAG_ROTATIONAL 5 NBD_FLAG_SEND_TRIM 6 NBD_FLAG_SEND_WRITE_ZEROES "
    "7 NBD_FLAG_SEND_DF 8 NBD_FLAG_CAN_MULTI_CONN 9 NBD_FLAG_SEND_RESIZE 10 NBD_FLAG_SEND_CACHE "
    "11 NBD_FLAG_SEND_FAST_ZERO 12 NBD_FLAG_BLOCK_STATUS_PAYLOAD",
    CommandFlag: "0 NBD_CMD_FLAG_FUA 1 NBD_CMD_FLAG_NO_HOLE 2 NBD_CMD_FLAG_DF "
    "3 NBD_CMD_FLAG_REQ_ONE 4 NBD_CMD_FLAG_FAST_ZERO 5 NBD_CMD_FLAG_PAYLOAD_LEN",
    ReplyFlag: "0 NBD_REPLY_FLAG_DONE",
    State: "0 NBD_STATE_HOLE 1 NBD_STATE_ZERO",
}


def pairs(text: str) -> list[tuple[int, str]]:
    words = text.split()
    return [(int(n, 0), name) for n, name in zip(words[::2], words[1::2], strict=True)]


@pytest.mark.parametrize("family", NUMBERS, ids=lambda family: family.__name__)
def test_numbers_and_names(family: type[IntEnum]) -> None:
    assert [(int(member), str(member)) for member in family] == pairs(NUMBERS[family])


@pytest.mark.parametrize("family", BITS, ids=lambda family: family.__name__)
def test_bits_and_names(family: type[IntFlag]) -> None:
    assert [(int(member).bit_length() - 1, str(member)) for member in family] == pairs(BITS[family])


def test_magic_numbers() -> None:
    assert values.NBDMAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert values.IHAVEOPT.to_bytes(8, "big") == b"IHAVEOPT"
    assert values.OPTION_REPLY_MAGIC == 0x0003E889045565A9
    assert values.REQUEST_MAGIC == 0x25609513
    assert values.EXTENDED_REQUEST_MAGIC == 0x21E41C71
    assert values.SIMPLE_REPLY_MAGIC == 0x67446698
    assert values.STRUCTURED_REPLY_MAGIC == 0x668E33EF
    assert values.EXTENDED_REPLY_MAGIC == 0x6E8A278C


def test_limits() -> None:
    assert values.DEFAULT_PORT == 10809
    assert values.MAX_STRING == 4096
    assert values.MAX_PAYLOAD == 33_554_432
    assert values.EXPORT_NAME_PADDING == 124
    assert values.MAX_ERROR_MESSAGE + 14 < 1000


def test_unknown_numbers_are_kept_and_print_as_hexadecimal() -> None:
    assert Option(99) == 99
    assert str(Option(99)) == f"{Option(99)}" == "0x63"
    assert str(Command(0xFFFF)) == "0xffff"
    assert 99 not in list(Option)
    assert pickle.loads(pickle.dumps(Option(99))) == 99


@pytest.mark.parametrize("value", [-1, "1", None])
def test_what_is_no_number_of_the_wire_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a valid"):
        Option(value)


def test_flags_are_joined_and_unknown_bits_print_as_hexadecimal() -> None:
    assert str(CommandFlag.FUA | CommandFlag.REQ_ONE) == "NBD_CMD_FLAG_FUA|NBD_CMD_FLAG_REQ_ONE"
    assert f"{CommandFlag(0x8001)}" == "NBD_CMD_FLAG_FUA|0x8000"
    assert str(CommandFlag(0x40)) == "0x40"
    assert str(CommandFlag(0)) == "0"


def test_a_complement_holds_the_unknown_bits() -> None:
    legal = CommandFlag.FUA | CommandFlag.DF
    assert CommandFlag(0x8005) & ~legal == 0x8000
    assert 0x8005 & ~legal == 0x8000
    assert legal & ~CommandFlag.FUA == CommandFlag.DF
    assert ClientFlag(0x80000001) & ~ClientFlag.FIXED_NEWSTYLE == 0x80000000


def test_error_bits() -> None:
    assert [reply.is_error for reply in OptionReply] == [False] * 4 + [True] * 10
    assert [chunk.is_error for chunk in ReplyType] == [False] * 5 + [True] * 2


@pytest.mark.parametrize("family", BITS, ids=lambda family: family.__name__)
def test_what_a_peer_sent_is_not_kept(family: type[IntFlag]) -> None:
    before = len(family._value2member_map_)
    for value in range(0, 20_000 << 13, 1 << 13):
        assert family(value) == value
        assert family(1) | family(value) == 1 | value
    assert family(~1) == 0xFFFFFFFE
    assert len(family._value2member_map_) == before
