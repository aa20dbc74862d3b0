"""The form of a message (a question, code, a role play, ...), by simple rules from its words alone."""

from __future__ import annotations

import re
from enum import Enum

READ_CHARACTERS = 1500


class Form(Enum):
    """Forms of a user's message."""

    CODE = "a coding task"
    PLAY = "a role play"
    WRITING = "a writing task"
    QUESTION = "a question"
    TALK = "small talk"
    REQUEST = "a request"
    REMARK = "a remark"


class Reply(Enum):
    """Forms of an assistant's answer."""

    REFUSAL = "declines to help"
    CODE = "gives code"
    STEPS = "lists steps"
    QUESTION = "asks back"
    REMARK = "makes a remark"
    EXPLANATION = "gives an answer"


_CODE = re.compile(
    r"```|\bdef \w+\(|^import \w+|^from \w+ import\b|#include|(?-i:\bSELECT\b.+\bFROM\b)|console\.log|\bfunction \w*\("
    r"|\b(?:python|javascript|java|c\+\+|sql|bash|html|css|php|rust) (?:code|script|function|program|query|class)\b"
    r"|\b(?:write|create|make|develop|build|generate|implement|fix|debug) (?:me )?(?:an? |some |the |this )?(?:\w+ )?"
    r"(?:code|script|function|program|algorithm|query|regex)\b",
    re.MULTILINE | re.IGNORECASE,
)
_PLAY = re.compile(
    r"\b(?:pretend|role[- ]?play|act(?:ing)? as|imagine|hypothetical\w*|you are (?:now|going to)|stay in character"
    r"|you are an? [\w ,-]{0,40}\b(?:assistant|expert|bot|ai|model|writer|engineer|character|teacher|agent|developer)"
    r"|my (?:novel|story|screenplay|character|hero)|(?:a|this|short) (?:story|novel)|film script|fiction\w*)\b",
    re.IGNORECASE,
)


_WRITING = re.compile(
    r"\b(?:write|draft|compose|rewrite|paraphrase|summari[sz]e|translate|edit|proofread)\b"
    r"|\b(?:create|generate|make|give me|design|prepare|come up with) (?:me )?(?:an? |some |the )?(?:\w+ )?"
    r"(?:post|tweet|letter|article|essay|email|speech|list|poem|joke|ad|slogan|blog|guide|tutorial|plan|title|text"
    r"|message|review|report|song|summary)s?\b",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"\?|\uff1f|\u061f"
    r"|^\W*(?:(?:hi|hey|hello|so|and|but|please|ok|okay|yo)\W+)*(?:how|what|what's|whats|why|when|where|who|whom|whose"
    r"|which|is|are|am|was|were|do|does|did|can|could|should|would|will|has|have|may)\b",
    re.IGNORECASE,
)
_TALK = re.compile(
    r"\W*(?:hi|hello|hey|thanks|thank you|good (?:morning|evening|night|afternoon|day)|how are you|how do you do"
    r"|what's up|bye|goodbye|see you|nice to meet you|ok|okay|cool|great|lol|haha)\b",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"\b(?:please|pls|help me|tell me|teach me|show me|give me|let me know|i want|i need|i'd like|i would like|i wanna"
    r"|need to|steps to|ways? to|tips|guide|tutorial)\b"
    r"|^\W*(?:explain|describe|list|name|provide|find|play|set|book|order|turn|add|remind|call|open|start|stop|show"
    r"|suggest|recommend|compare|discuss|outline|identify|develop|create|generate|make|build|design|convert|classify"
    r"|solve|calculate|analy[sz]e|answer|choose|complete|give|get|send|check|ignore|respond|reply|say|use|buy|order)\b",
    re.IGNORECASE,
)
_PEOPLE = re.compile(
    r"\b(?:you|your|u|he|she|they|him|her|them|his|their|people|everyone|guys?|men|women|man|woman|boys?|girls?)\b",
    re.IGNORECASE,
)
_FOREIGN = re.compile(
    r"\b(?:der|das|und|ist|nicht|ein|eine|wie|ich|mit|f\u00fcr|auf|le|la|les|est|des|une|pour|que|qui|dans|je|comment"
    r"|el|los|las|una|para|c\u00f3mo|por|del|il|di|che|per|non|como|um|uma|n\u00e3o|het|een|van|niet)\b",
    re.IGNORECASE,
)
_ENGLISH = re.compile(
    r"\b(?:the|a|an|to|of|and|is|are|in|that|it|you|i|for|how|what|do|my|with|on|this|can|be|not|me)\b", re.IGNORECASE
)
_STEPS = re.compile(r"^\W{0,4}(?:step )?\d{1,2}[.):]", re.MULTILINE | re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:unfortunately,? |well,? |oh,? |no[,.] )?(?:"
    r"(?:i['\u2019]?m|i am|we['\u2019]?re|we are) (?:very |so |really |truly )?sorry\b"
    r"(?! (?:that|to hear|about|for you|you))|sorry[,.]|as an ai|my apologies"
    r"|i (?:deeply |sincerely )?apologi[sz]e"
    r"|i (?:can ?not|can['\u2019]?t|won['\u2019]?t|will not|am unable|must decline|have to decline|refuse)\b"
    r"|i (?:do not|don['\u2019]?t) (?:feel comfortable|think i (?:can|should)|provide|support|condone|encourage|promote"
    r"|engage|have the ability|create|assist)"
    r"|i['\u2019]?m (?:unable|not able|not comfortable|not going to)"
    r"|(?:it is|it['\u2019]s) (?:not (?:ethical|appropriate|legal|acceptable|okay|ok|right|possible for me)|illegal)"
    r")",
    re.IGNORECASE,
)
_SMALL_TALK_WORDS, _SHORT_REPLY_WORDS, _LISTED = 8, 30, 2


def form_of(text: str) -> Form:
    """The form of a user's message: the first that matches."""
    read = text[:READ_CHARACTERS]
    if _CODE.search(read):
        return Form.CODE
    if _PLAY.search(read):
        return Form.PLAY
    if _WRITING.search(read):
        return Form.WRITING
    if _TALK.match(read) and len(read.split()) <= _SMALL_TALK_WORDS:
        return Form.TALK
    if _QUESTION.search(read):
        return Form.QUESTION
    return Form.REQUEST if _REQUEST.search(read) else Form.REMARK


def reply_of(text: str) -> Reply:
    """The form of an assistant's answer: the first that matches."""
    read = text[:READ_CHARACTERS].strip()
    if is_refusal(read):
        return Reply.REFUSAL
    if "```" in read:
        return Reply.CODE
    if len(_STEPS.findall(read)) >= _LISTED:
        return Reply.STEPS
    if len(read.split()) > _SHORT_REPLY_WORDS:
        return Reply.EXPLANATION
    return Reply.QUESTION if read.endswith("?") else Reply.REMARK


def is_refusal(text: str) -> bool:
    """Whether an answer begins with a refusal."""
    return _REFUSAL.match(text.strip()) is not None


def speaks_of_people(text: str) -> bool:
    """Whether the text contains a pronoun or a word for a person."""
    return _PEOPLE.search(text[:READ_CHARACTERS]) is not None


def is_foreign(text: str) -> bool:
    """Whether the text seems not to be English, by its letters or its function words."""
    read = text[:READ_CHARACTERS]
    letters = sum(character.isalpha() for character in read)
    if letters > 2 * sum(character.isascii() and character.isalpha() for character in read):
        return True
    return len(_FOREIGN.findall(read)) > max(1, len(_ENGLISH.findall(read)))
