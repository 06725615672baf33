"""Valid files, damaged in all the ways that hypothesis can think of."""

from hypothesis import strategies as st

# What a parser of JSON may stumble over.
TOKENS = (
  *(b"", b"null", b"true", b"-1", b"0.5", b"1e999", b"NaN", b"Infinity"),
  *(b"9" * 30, b"9" * 5000, b"[" * 100_000, b"{}", b"[]", b'"', b"\n", b","),
  *(b"\xff", b"\x00", b'"\\ud800"', b'"/etc/passwd"', b'"../a"', b'"\\u0000"'),
)


@st.composite
def of(draw, data: bytes) -> bytes:
  """`data` with a few pieces replaced, inserted or left out."""
  for _ in range(draw(st.integers(1, 3))):
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(start + 12, len(data))))
    new = draw(st.sampled_from(TOKENS) | st.binary(max_size=6))
    data = data[:start] + new + data[stop:]
  return data
