"""What a language model replies, and the answer in it: models think aloud, announce, wrap, offer
several, and refuse.

The rules know what is usual, English first. What no rule knows stays as it came.
"""

import re
from dataclasses import dataclass

CUT = ("length", "max_tokens", "model_length", "error")  # servers' words for a reply that broke off
REFUSED = "refusal"  # this kit's, for a text where servers put refusals
FILTERED = ("content_filter", "safety", "prohibited_content", "recitation")


@dataclass(frozen=True)
class Reply:
    """A reply as it came. text: "" where there is none; where the server refused the prompt, its
    message. finish: the server's word for why the reply ended. status: that of HTTP."""

    text: str = ""
    finish: str | None = None
    status: int = 200


def fault(reply: Reply) -> str:
    """Why a reply is not one to read, by how it ended; "" for the others."""
    if reply.status != 200:
        return f"request refused, HTTP {reply.status}"
    for words, reason in ((FILTERED, "reply stopped by a filter"), (CUT, "reply cut off")):
        if (reply.finish or "").lower() in words:
            return reason
    whole = without_thoughts(reply.text) or not reply.text.strip()
    return "" if whole else "reply of thoughts alone"


TAGS = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis)"
_THOUGHT = re.compile(rf"(?is)<({TAGS})>.*?</\1>|◁think▷.*?◁/think▷|\[think\].*?\[/think\]"
                      r"|<\|begin_of_thought\|>.*?<\|end_of_thought\|>")
_END_OF_THOUGHT = re.compile(  # that the prompt's template began
    r"(?is)\A.*(?:</(?:seed:)?think(?:ing)?>|◁/think▷|\[/think\]|<\|end_of_thought\|>"
    r"|<\|channel\|>final<\|message\|>)|\Aanalysis.*assistantfinal")
_OPEN_THOUGHT = re.compile(rf"(?i)<{TAGS}>|◁think▷|\[think\]|<\|begin_of_thought\|>"
                           r"|<\|channel\|>analysis")


def without_thoughts(text: str) -> str:
    """The text without thoughts in tags; nothing where it ends amid them."""
    text = _END_OF_THOUGHT.sub("", _THOUGHT.sub("", text))
    return "" if _OPEN_THOUGHT.search(text) else text.strip()


_WHAT = (r"(?:answers?|descriptions?|captions?|versions?|responses?|sentences?|texts?|rewrites?"
         r"|paragraphs?|statements?|outputs?|results?)")
_MADE = (r"(?:re-?written|re-?phrased|modified|revised|altered|edited|corrupted|changed|incorrect"
         r"|wrong|false|flawed|new|updated|final|possible|plausible)")
_YES = (r"(?:sure(?: thing)?|certainly|of course|absolutely|definitely|ok(?:ay)?|alright|great"
        r"|understood|got it|no problem|claro|por supuesto|natürlich|gerne?|bien sûr|certo|конечно"
        r"|好的|当然(?:可以)?|没问题|もちろん(?:です)?|はい|네|물론(?:입니다|이죠)?)")
_HERE = (r"(?:here(?:['’]s| is| are| you go| it is)|below (?:is|are)|the following (?:is|are)"
         r"|this is|voici|voilà|hier (?:ist|sind)|aquí (?:está|tienes?)|aqui está|ecco|вот"
         r"|以下[是为]|[这這]是|改写后的?|修改后的?|以下は|다음은)")
_PREFACES = (  # "Sure!", "Here is the rewritten answer:", "**Rewritten answer:**"
    re.compile(rf"(?i)\A\W*{_YES}\s*(?:[!.。！]+|[,，:：](?=\s*{_HERE})|\n)\s*"),
    re.compile(rf"(?i)\A\W*{_HERE}(?:[^:：\n]{{0,120}}[:：][*_]*\s*\n+|[^:：\n]{{0,80}}"
               rf"(?:\b{_WHAT}\b|答案|回答|描述|答え|답변)[^:：\n]{{0,80}}[:：]|[:：])[*_]*\s*"),
    re.compile(rf"(?i)\A\W*(?:(?:the )?(?:{_MADE} )*{_WHAT}(?: is)?|assistant|答案|回答|描述)"
               r"[*_]*\s*[:：][*_]*\s*"))
_LABEL = re.compile(rf"(?im)^\W*(?:the )?{_MADE} {_WHAT}[*_]*\s*[:：][*_]*\s*")
_AFTERWORD = re.compile(
    r"(?is)\n\s*[*_(\[]*(?:(?:please )?note(?: that|[*_]*:)|(?:explanations?|(?:the |list of )?"
    r"(?:changes|mistakes|errors|modifications|differences))\b[^\n:.]{0,40}:|[注说][:：明意]).*\Z"
    r"|\n\s*\n\s*[*_(\[]*(?:let me know|feel free|i hope|hope (?:this|that)|i(?:['’]ve| have)?"
    r" (?:changed|introduced|replaced|made|modified|altered|swapped)|would you like|is there "
    r"anything|in this (?:version|rewrite)|希望).*\Z")
_END_TOKEN = re.compile(r"(?:</s>|<\|(?:im_end|eot_id|end|endoftext|return)\|>|<end_of_turn>"
                        r"|\s)+\Z")
_ANSWER_TAG = re.compile(r"(?is)\A.*?<(answer|final_answer|output|response|rewritten)>(.*)</\1>.*\Z"
                         r"|\A.*?<\|begin_of_(solution)\|>(.*)<\|end_of_solution\|>.*\Z")
_FENCE = re.compile(r"(?s)\A```[^\n`]*\n(.*?)\n?```.*\Z")
_ROUND = (*zip("\"“«「『‘'`", "\"”»」』’'`", strict=True), ("**", "**"), ("*", "*"), ("__", "__"))


def _out_of_tags(text: str) -> str:
    inside = _ANSWER_TAG.match(_END_TOKEN.sub("", text))
    return (inside[2] or inside[4] or "") if inside else _END_TOKEN.sub("", text)


def _without_preface(text: str) -> str:
    labels = list(_LABEL.finditer(text))
    if len(labels) == 1:
        return text[labels[0].end():]
    for preface in _PREFACES:
        text = preface.sub("", text) or text
    return text


def _out_of_quotes(text: str) -> str:
    for left, right in _ROUND:
        inside = text[len(left):-len(right)]
        if text.startswith(left) and text.endswith(right) and inside and (
                left not in inside and right not in inside):
            return inside
    return text


# In this order; what the annotated answer itself would lose by one is left in the reply too.
_STEPS = (_out_of_tags, _without_preface, lambda text: _FENCE.sub(r"\1", text),
          lambda text: _AFTERWORD.sub("", text), _out_of_quotes)

_NOT = (r"(?:can(?:no|')t|can not|could(?:n't| not)|(?:am|'m) (?:unable|not able|not programmed) to"
        r"|won't|will not|must decline|decline to|refuse to|(?:don't|do not) feel comfortable"
        r"|(?:am|'m) not comfortable)")
_DO = (r"(?:help|assist|comply|fulfil\w*|provid\w*|creat\w*|generat\w*|rewrit\w*|writ\w*|produc\w*"
       r"|complet\w*|process\w*|answer\w*|respond\w*|continu\w*|engag\w*|support\w*|discuss\w*"
       r"|do (?:that|this|so)|mak\w+ (?:up|this|that|changes)|modif\w+|alter\w*|offer\w*|shar\w+"
       r"|participat\w*|introduc\w*)")
_PICTURE = r"(?:images?|pictures?|photos?|attachments?)"
_REFUSALS = "|".join((
    # that it cannot, or will not
    rf"\A\W*(?:unfortunately,? |regrettably,? |but |however,? )?i ?{_NOT} (?:to )?(?:\w+ly )?"
    rf"(?:be able to )?(?:with )?{_DO}\b",
    r"\A\W*(?:oh,? )?(?:(?:i'm|i am|we're|we are) (?:\w+ )?sorry|sorry|(?:i|we) apologi[sz]e"
    r"|(?:my |our )?apologies|unfortunately)\b[^.!?\n]{0,100}\b(?:can(?:no|')t|can not|could(?:n't"
    r"| not)|unable|not able|won't|don't|do not|didn't|not (?:something|comfortable|appropriate)"
    r"|no (?:answer|text|description|image))",
    r"\A\W*(?:(?:i'm|i am) (?:\w+ )?)?sorry\W*\Z",
    r"\b(?:against|violates?) (?:my|our|the|openai's) (?:\w+ )?(?:guidelines|polic(?:y|ies)"
    r"|programming)",
    # that it is a machine, and sees nothing
    r"\b(?:as an?|being an?|i(?:'m| am) (?:just |only )?an?) (?:[\w-]+ )?(?:(?:ai|artificial "
    r"intelligence)(?: language model| model| assistant| system|,| i\b| and\b)|language model)",
    rf"\A.{{0,120}}\bi ?(?:{_NOT}|don't have (?:access|the ability) to) (?:\w+ly )?(?:see|view"
    r"|access|open|analy[sz]e|perceive|process|look at)? ?(?:the |any |an |this |that |your "
    rf"|actual |attached |provided )*{_PICTURE}\b",
    # that it waits for the text
    r"\A\W*(?:(?:sure|of course|certainly|(?:i'd be )?happy to (?:help|assist))\W+)?(?:but )?"
    r"(?:please|could you|can you|would you)\W+(?:please )?(?:provide|share|give me|paste|supply"
    r"|specify)\b",
    r"\A[^.\n]{0,60}\byou (?:haven't|have not|didn't|did not) (?:provided?|given?|shared?)",
    # the same in Chinese, and how it begins elsewhere
    r"\A\W*(?:[很非]?常?抱歉|对不起|不好意思)|作为(?:一[个名款])?(?:ai|人工智能|语言模型|大模型)",
    r"\A[^。\n]{0,20}我(?:无法|不能|没办法)(?:提供|协助|帮助|满足|回答|完成|生成|改写|处理)",
    r"\A\W*(?:(?:je suis |je m')?(?:désolée?|excuse)|(?:es )?tut mir (?:sehr )?leid|lo siento"
    r"|lo lamento|(?:me )?desculpe|mi dispiace|извините|простите|к сожалению, я не|申し訳"
    r"|すみません|죄송합니다|미안하지만)"))
_REFUSAL = re.compile(f"(?i){_REFUSALS}")
_ITEM = re.compile(r"(?m)^\s*(?:\d+[.):]|[-*•])\s+\S")
_ALTERNATIVE = re.compile(
    rf"(?im)^\W*(?:{_MADE} )?(?:option|alternative|variant|variation|example|possibility|choice"
    rf"|{_WHAT})\s*#?(?:\d+|[A-D])\b")
_OR = re.compile(r"(?im)^\W*(?:or|oder|ou|或者?|または)\W*$")


def _refuses(text: str) -> bool:
    return bool(_REFUSAL.search(text[:400].replace("’", "'")))


def _several(text: str) -> bool:
    """Whether a reply holds several answers: marked alternatives, or nothing but a list's items."""
    body = _without_preface(text).strip()
    lines = [line for line in body.splitlines() if line.strip()]
    return (len(_ALTERNATIVE.findall(body)) > 1 or bool(_OR.search(body)) or text.count("```") > 2
            or len(lines) > 1 and all(map(_ITEM.match, lines)))


def rewritten(reply: Reply, answer: str) -> tuple[str, str]:
    """The text that a reply to "rewrite this answer" offers in the answer's place, and "" or why it
    offers none; then the text is the reply's own.

    Thoughts, prefaces, afterwords, fences and quotes round it all are taken off. A rule under which
    the annotated answer itself would change or be dropped is not used on its rewriting.
    """
    if reason := fault(reply):
        return reply.text, reason
    text = without_thoughts(reply.text)
    if (reply.finish == REFUSED or _refuses(text)) and not _refuses(answer):
        return reply.text, "reply that refuses"
    if _several(text) and not _several(answer):
        return reply.text, "reply of several answers"
    for step in _STEPS:
        if step(answer) == answer:
            text = step(text).strip()
    return text, ""


def candidate(reply: Reply, annotated: str) -> dict[str, str]:
    """{text} of the answer in a reply; {text, fault} where it holds none: the reply, and why."""
    text, fault = rewritten(reply, annotated)
    return {"text": text, "fault": fault} if fault else {"text": text}
