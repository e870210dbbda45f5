#!/usr/bin/env python3
"""Turn what `fetch.py` fetched into prompts for training, and into questions with answers for validation and test.

    scripts/data/prepare.py DIR OUT [--questions FILE]

Writes OUT/{train,valid,test}.prompts.jsonl, which `overfill answer` has the full model answer as it would (training, and
the loss on held-out documents); OUT/{valid,test}.jsonl, questions with answers that people gave; and
OUT/{valid,test}.open.prompts.jsonl, questions whose right answer is the full model's. The same input gives the same files.
With --questions, a file of answered prompts, OUT/train.questions.jsonl asks the full model the questions that it thought of
itself. Every line names its document; `check.py` proves that no two splits share one.
"""

import argparse
import json
import pathlib
import random
import re

import sources
import tasks

# Of 100 articles so many go to test, and so many to validation.
TEST, VALID = 6, 4
# Lines of a task in validation and test.
COUNTS = {"valid": 100, "test": 300}
# Which score tells best whether a task was done. Where a few words are asked for, they need only be in the answer.
METRICS = {"qa": "contains", "facts": "contains", "title": "contains"}


def conversation(prompt, task, document, answers=()):
    messages = [{"role": "user", "content": prompt}]
    if answers:
        messages.append({"role": "assistant", "content": answers[0]})
    line = {"messages": messages, "task": task}
    if answers:
        line |= {"answers": list(answers), "metric": METRICS.get(task, "f1")}
    return line | {"document": document}


class Splits:
    """Documents by split. SQuAD and Wikipedia tell of some things alike: those follow SQuAD's split."""

    def __init__(self, folder):
        squad = list(sources.squad(folder))
        self.squad = {split: [p for p in squad if self.half(p["title"]) == split] for split in COUNTS}
        about = {sources.key(p["title"]) for p in squad}
        self.asset = {split: [e for e in sources.asset(folder) if self.half(e["text"]) == split] for split in COUNTS}
        self.wikipedia = {"train": [], "valid": [], "test": []}
        for article in sources.wikipedia(folder):
            number = sources.part(article["title"])
            split = "test" if number < TEST else "valid" if number < TEST + VALID else "train"
            if sources.key(article["title"]) not in about:
                self.wikipedia[split].append(article)
        self.drop_copies()

    @staticmethod
    def half(name):
        return "test" if sources.part(name, 2) else "valid"

    def drop_copies(self):
        """Takes out of training what quotes another split, and out of validation what quotes the test."""
        seen = set()
        for split in ["test", "valid", "train"]:
            fit = [a for a in self.wikipedia[split] if seen.isdisjoint(sources.shingles(a["text"]))]
            self.wikipedia[split] = fit
            texts = [a["text"] for a in fit]
            if split in COUNTS:
                self.squad[split] = [p for p in self.squad[split] if seen.isdisjoint(sources.shingles(p["text"]))]
                texts += [p["text"] for p in self.squad[split]]
                texts += [text for e in self.asset[split] for text in [e["text"], *e["answers"]]]
            for text in texts:
                seen |= sources.shingles(text)


def sentence_at(text, start):
    """The sentence that this character is in, if it is neither short nor long."""
    at = 0
    for sentence in sources.sentences(text):
        at = text.index(sentence, at)
        if start < at + len(sentence):
            return sentence if 10 <= len(sentence.split()) <= 45 else None
    return None


def held_out(splits, split, rng):
    """Questions with their answers, task by task."""
    lines = []

    def add(task, made):
        made = list(made)
        rng.shuffle(made)
        lines.extend(made[: COUNTS[split]])

    def qa():
        for paragraph in splits.squad[split]:
            for question, start, answers in paragraph["questions"]:
                text = sentence_at(paragraph["text"], start)
                if text:
                    yield conversation(tasks.ANSWER[0].format(text=text, question=question), "qa", "squad: " + paragraph["title"], answers)

    add("qa", qa())
    articles = splits.wikipedia[split]
    named = lambda article: "wikipedia: " + article["title"]
    people = [tasks.facts(rng) for _ in range(COUNTS[split])]
    add("facts", (conversation(tasks.ANSWER[0].format(text=t, question=q), "facts", f"facts: {t}", [a]) for t, q, a in people))
    short = [a for a in articles if 3 <= len(sources.sentences(a["text"])) and len(a["text"].split()) <= 120]
    add("first", (conversation(tasks.FIRST[0].format(**a), "first", named(a), [sources.sentences(a["text"])[0]]) for a in short))
    add("title", (conversation(tasks.TITLE[0].format(**a), "title", named(a), [tasks.plain(a["title"]), a["title"]]) for a in short))
    add("summary", (conversation(tasks.SUMMARY[0].format(**a), "summary", named(a), [sources.sentences(a["text"])[0]]) for a in short))
    simple = splits.asset[split]
    add("simple", (conversation(tasks.SIMPLE[0].format(**e), "simple", "asset: " + e["text"], e["answers"]) for e in simple))
    return lines


def notes_line(rng, articles):
    prompt, answer = tasks.notes(rng, articles)
    return conversation(prompt, "notes", [f"wikipedia: {a['title']}" for a in articles], [answer])


def open_prompts(rng, articles, split):
    """Questions without a text."""
    for article in articles:
        wordings = {"People": tasks.PEOPLE, "Geography": tasks.PLACES}.get(article["topic"], tasks.OPEN)
        if article["topic"] == "Uncategorized":
            wordings = tasks.OPEN[:2]
        title = tasks.plain(article["title"])
        title = title if article["topic"] in ("People", "Geography", "Uncategorized") else title[0].lower() + title[1:]
        yield rng.choice(wordings).format(title=title), "wikipedia: " + article["title"]
        if article["topic"] in ("Everyday life", "Technology", "Biology and health sciences", "Arts"):
            yield rng.choice(wordings + tasks.CREATIVE).format(title=title), "wikipedia: " + article["title"]
    for prompt in tasks.everyday():
        number = sources.part(prompt)
        if split == ("test" if number < TEST else "valid" if number < TEST + VALID else "train"):
            yield prompt, f"everyday: {prompt}"


def prompts(splits, split, rng):
    """Prompts for the full model, of all kinds."""
    articles = splits.wikipedia[split]
    made = [conversation(prompt, "open", document) for prompt, document in open_prompts(rng, articles, split)]
    described = [a for a in articles if 3 <= len(a["description"].split()) <= 10]
    for article in articles:
        document = "wikipedia: " + article["title"]
        on_text = [
            ("summary", tasks.SUMMARY, 3), ("first", tasks.FIRST, 1), ("title", tasks.TITLE, 1), ("keywords", tasks.KEYWORDS, 1),
            ("points", tasks.POINTS, 2), ("ask", tasks.ASK, 3),
        ]  # fmt: skip
        # Two of these of each text.
        for task, wordings in rng.sample([(t, w) for t, w, weight in on_text for _ in range(weight)], 2):
            if len(article["text"].split()) <= 180:
                made.append(conversation(rng.choice(wordings).format(text=article["text"]), task, document))
        sentence = tasks.some_sentence(rng, article["text"])
        if sentence:
            task, wordings = rng.choice([("simple", tasks.SIMPLE), ("rewrite", tasks.REWRITE)])
            made.append(conversation(rng.choice(wordings).format(text=sentence), task, document))
    for _ in range(len(articles) // 7):
        text, question, _ = tasks.facts(rng)
        made.append(conversation(rng.choice(tasks.ANSWER).format(text=text, question=question), "facts", f"facts: {text}"))
    for _ in range(len(articles) // 7):
        line = notes_line(rng, rng.sample(described, 4))
        made.append(conversation(line["messages"][0]["content"], "notes", line["document"]))
    rng.shuffle(made)
    return made


# How a question begins that a text may answer; and words of answers that talk about the question instead.
BEGINS = tuple("What Who When Where Why How Which Is Are Was Were Did Does Do In".split())
ABOUT_ITSELF = re.compile(r"\b(question|answer|text|passage|you|your)\b", re.IGNORECASE)


def questions(answered, splits, rng):
    """A question about every third text; and those that the full model wrote when it was asked for one, if they are any."""
    texts = {"wikipedia: " + a["title"]: a["text"] for a in splits.wikipedia["train"]}
    asked = []
    for article in rng.sample(splits.wikipedia["train"], len(splits.wikipedia["train"]) // 3):
        wordings = tasks.ABOUT.get(article["topic"], ["What is {title}?"])
        asked.append((rng.choice(wordings).format(title=tasks.plain(article["title"])), "wikipedia: " + article["title"]))
    for line in map(json.loads, answered):
        if line["task"] == "ask":
            question = line["messages"][-1]["content"].strip().strip('"').split("\n")[0]
            fit = question.startswith(BEGINS) and question.endswith("?") and 4 <= len(question.split()) <= 25
            if fit and not ABOUT_ITSELF.search(question):
                asked.append((question, line["document"]))
    rng.shuffle(asked)
    for question, document in asked:
        yield conversation(rng.choice(tasks.ANSWER).format(text=texts[document], question=question), "qa", document)


def write(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{path}: {len(lines)} lines")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--questions", type=pathlib.Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    splits = Splits(args.folder)
    if args.questions:
        with open(args.questions, encoding="utf-8") as answered:
            write(args.out / "train.questions.jsonl", list(questions(answered, splits, random.Random(3))))
        return
    write(args.out / "train.prompts.jsonl", prompts(splits, "train", random.Random(1)))
    for split, count in COUNTS.items():
        rng = random.Random(f"2 {split}")
        write(args.out / f"{split}.jsonl", held_out(splits, split, rng))
        asked = [conversation(prompt, "open", document) for prompt, document in open_prompts(rng, splits.wikipedia[split], split)]
        rng.shuffle(asked)
        write(args.out / f"{split}.open.prompts.jsonl", asked[:count])
        write(args.out / f"{split}.prompts.jsonl", prompts(splits, split, rng)[: 2 * count])


main()
