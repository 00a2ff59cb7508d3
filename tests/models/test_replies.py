"""What a text model replies to "rewrite this answer", and what is taken from it."""

import pytest

from bpo.models.replies import REFUSED, Reply, rewritten, without_thoughts

ANNOTATED, ANSWER = "The dog is black.", "The cat is black."
THOUGHTS = (
    "<think>hm</think>\n\n{}", "hm, so</think>{}", "<thinking>a\nb</thinking> {}",
    "<think>a <think> b</think> c</think>{}", "<think></think>{}", "◁think▷x◁/think▷{}",
    "[THINK]x[/THINK]{}", "<|begin_of_thought|>x<|end_of_thought|>{}", "{}<reasoning>x</reasoning>",
    "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "analysisWe need that.assistantfinal{}")
ROUND = (
    "Sure! Here is the rewritten answer:\n\n{}", "Sure, here's a modified version: {}",
    "Certainly! {}", "Here’s the rewritten description with plausible mistakes:\n{}",
    "Of course! Here you go:\n\n“{}”", "**Rewritten answer:** {}", "Answer: {}", "Assistant: {}",
    "The rewritten answer is: {}", "I changed an animal.\n\nRewritten answer: {}",
    "Sure! Here it is:\n```\n{}\n```\nLet me know if you need more.", "```text\n{}\n```", "`{}`",
    '"{}"', "'{}'", "«{}»", "「{}」", "**{}**", "{}\n\n(Note: I changed the animal.)",
    "{}\n\nLet me know if you'd like another!", "{}\n\n**Mistakes introduced:**\n1. an animal",
    "{}</s>", "{}<|im_end|>", "<think>x</think><answer>{}</answer>",
    "<|begin_of_solution|>{}<|end_of_solution|>", "好的，以下是改写后的答案：\n{}",
    "Voici la réponse réécrite :\n\n{}", "Natürlich! Hier ist die Antwort:\n{}")
PLAIN = (
    ANSWER, "Yes", "Okay.", "Sure, there is a dog.", "*", "2", "Great weather, blue sky.",
    "Here is a cat on a mat.", "This is a photo of a cat: it is black.", "The answer is no.",
    '"stop" and "go"', 'A sign says "stop".', "'Tis a cat's toy, the dogs'", "It can't be helped.",
    "The text on the sign: stop", "The image shows:\n- a cat\n- a dog", "一只黑色的猫。",
    "There is a note on the table.\nNote the dog.", "I cannot see the man's face.",
    "I can't tell what colour it is.", "Sorry is written on the sign.", "It works as a machine.",
    "Unfortunately the dog is hidden.", "He shares an image and can't help it.",
    "Please keep off the grass.")
REFUSALS = (
    "I'm sorry, but I can't assist with that.", "I’m sorry, but I can’t help with that request.",
    "Sorry, I can't do that.", "I cannot provide a wrong answer.", "I'm unable to help with this.",
    "As an AI language model, I can't see images.", "I can't see the image, so I cannot say.",
    "I apologize, but I cannot fulfill this request.", "Unfortunately, I can't rewrite this.",
    "I won't be able to help with that.", "I'm sorry.", "I am an AI and have no eyes.",
    "Please provide the answer you would like me to rewrite.", "I must decline to answer.",
    "Sure! Could you please share the description?", "You haven't provided an answer.",
    "This goes against my guidelines.", "I don't feel comfortable rewriting this.",
    "I'm not able to generate false information.", "<think>ok</think>I'm sorry, I cannot help.",
    "抱歉，我无法提供帮助。", "作为一个AI语言模型，我不能", "Je suis désolé, mais je ne peux pas.",
    "Es tut mir leid, aber das kann ich nicht.", "Lo siento, no puedo ayudar.",
    "К сожалению, я не могу", "申し訳ありませんが", "죄송합니다.")
SEVERAL = (
    "1. The cat.\n2. The dog.", "- a cat\n- a dog", "Option 1: a cat\nOption 2: a dog",
    "Here are three versions:\n1. a\n2. b\n3. c", "The cat.\n\nOR\n\nThe dog.",
    "**Answer 1:** x\n**Answer 2:** y", "Version A: x\nVersion B: y", "```\na\n```\n```\nb\n```")


@pytest.mark.parametrize("reply, text, why", (
    *((Reply(form.format(ANSWER), "stop"), ANSWER, "") for form in (*THOUGHTS, *ROUND)),
    *((Reply(text), text, "") for text in (*PLAIN, "")),
    *((Reply(text, "stop"), text, "reply that refuses") for text in REFUSALS),
    (Reply("No.", REFUSED), "No.", "reply that refuses"),
    *((Reply(text, "stop"), text, "reply of several answers") for text in SEVERAL),
    *((Reply(text, "stop"), text, "reply of thoughts alone") for text in (
        "<think>hm", "<think>hm</think>\n", "a cat <think>or", "<|channel|>analysis<|message|>x")),
    *((Reply(text, finish), text, "reply cut off") for text, finish in (
        ("The cat is", "length"), ("<think>hm", "length"), ("x", "MAX_TOKENS"), ("", "error"))),
    (Reply("", "content_filter"), "", "reply stopped by a filter"),
    (Reply("too long", None, 400), "too long", "request refused, HTTP 400"),
    (Reply("x", None, 422), "x", "request refused, HTTP 422")))
def test_the_answer_in_a_reply_or_why_there_is_none(reply, text, why):
    assert rewritten(reply, ANNOTATED) == (text, why)


@pytest.mark.parametrize("annotated, reply", (
    ("1. a dog\n2. a cat", "1. a dog\n2. a hen"), ('"go"', '"stop"'), ("Answer: 3", "Answer: 4"),
    ("Sorry, I can't see a dog.", "Sorry, I can't see a cat."), ("**a dog**", "**a cat**"),
    ("Here is the answer: yes", "Here is the answer: no"), ("```\na = 1\n```", "```\na = 2\n```")))
def test_what_the_annotated_answer_has_itself_is_left(annotated, reply):
    assert rewritten(Reply(reply, "stop"), annotated) == (reply, "")


@pytest.mark.parametrize("form", THOUGHTS)
def test_a_text_without_its_thoughts(form):
    assert without_thoughts(form.format("Sure! 0.5")) == "Sure! 0.5"
