"""Characters that stand for others: letters of other alphabets that look like Latin ones, and hidden ASCII."""

LOOKALIKES = {
    "a": "\u0430\u03b1", "c": "\u0441", "d": "\u0501", "e": "\u0435", "h": "\u04bb", "i": "\u0456\u03b9",
    "j": "\u0458", "k": "\u03ba", "l": "\u04cf", "n": "\u0578", "o": "\u043e\u03bf", "p": "\u0440\u03c1",
    "q": "\u051b", "s": "\u0455", "u": "\u03c5\u057d", "v": "\u03bd", "w": "\u051d", "x": "\u0445\u03c7",
    "y": "\u0443\u03b3", "A": "\u0410\u0391", "B": "\u0412\u0392", "C": "\u0421", "E": "\u0415\u0395",
    "H": "\u041d\u0397", "I": "\u0406\u0399", "J": "\u0408", "K": "\u041a\u039a", "M": "\u041c\u039c",
    "N": "\u039d", "O": "\u041e\u039f", "P": "\u0420\u03a1", "S": "\u0405", "T": "\u0422\u03a4", "X": "\u0425\u03a7",
    "Y": "\u04ae\u03a5", "Z": "\u0396",
}  # fmt: skip
"""Cyrillic, Greek and Armenian letters that look like Latin ones."""

HIDDEN_ASCII = {chr(0xE0000 + code): chr(code) for code in range(0x20, 0x7F)}
"""Tag characters, invisible copies of ASCII: some tokenizers drop them, others and larger models read them."""
