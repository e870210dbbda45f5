"""What `fetch.py` put into a folder, as documents. Each has a name by which it goes into one split and no other."""

import hashlib
import json
import re

# Sentences end before a capital letter; not after initials and the commonest abbreviations.
SENTENCE = re.compile(r"(?<!\b[A-Z])(?<!\bMr)(?<!\bSt)(?<!\bDr)(?<!\bNo)(?<!\bvs)(?<!\bc)(?<=[.!?])\s+(?=[A-Z\"“])")


def sentences(text):
    return SENTENCE.split(text.strip())


def key(name):
    """A document's name without what does not tell documents apart."""
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def part(name, parts=100):
    """A number below `parts` that depends on the name alone."""
    return int(hashlib.sha256(key(name).encode()).hexdigest(), 16) % parts


def shingles(text, size=12):
    """All runs of `size` words: two texts that share one share more than a phrase."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def load(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def wikipedia(folder):
    """Leads of some 10,000 articles: title, text, description, topic."""
    for title, article in sorted(load(folder, "wikipedia").items()):
        text = re.sub(r"\s+", " ", article["extract"]).strip()
        if len(text.split()) >= 20 and text.endswith((".", "!", "?")):
            yield {"title": title, "text": text, "description": article["description"] or "", "topic": article["topic"]}


def squad(folder):
    """Paragraphs of 48 Wikipedia articles with questions: title, text, questions with their answers."""
    for article in load(folder, "squad")["data"]:
        for paragraph in article["paragraphs"]:
            questions = [
                (q["question"].strip(), q["answers"][0]["answer_start"], sorted({a["text"] for a in q["answers"]}, key=lambda text: (len(text), text)))
                for q in paragraph["qas"]
                if q["answers"]
            ]
            yield {"title": article["title"].replace("_", " "), "text": paragraph["context"], "questions": questions}


def asset(folder):
    """Sentences with simpler ones that people made of them: text, answers."""
    for example in load(folder, "asset")["examples"]:
        yield {"text": example["input"], "answers": example["target"]}
