"""Prompts. A task is worded in several ways for training; what is measured uses the first."""

import re

from sources import sentences

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Nora Oscar Paul Rosa Sam Tom Vera".split()
CITIES = "Paris Rome London Berlin Madrid Oslo Vienna Prague Dublin Athens Cairo Tokyo Lima Boston Chicago Toronto".split()
JOBS = "teacher doctor baker farmer pilot painter nurse lawyer singer writer gardener driver plumber chef".split()
PETS = "cat dog parrot rabbit horse hamster turtle goldfish snake".split()
COLOURS = "red blue green yellow purple orange black white pink brown".split()
DRINKS = "tea coffee milk juice water lemonade cocoa".split()
FACTS = [
    ("{0} lives in {1}.", "Where does {0} live?", CITIES),
    ("{0} works as a {1}.", "What is {0}'s job?", JOBS),
    ("{0} has a {1}.", "What animal does {0} have?", PETS),
    ("{0}'s favourite colour is {1}.", "What is {0}'s favourite colour?", COLOURS),
    ("{0} likes to drink {1}.", "What does {0} like to drink?", DRINKS),
]


SUMMARY = [
    "Summarize this text in one sentence.\n\n{text}",
    "Write a one-sentence summary of the following text:\n\n{text}",
    "{text}\n\nWhat is its main point? Answer in one sentence.",
]
FIRST = [
    "Copy the first sentence of this text.\n\n{text}",
    "{text}\n\nRepeat the first sentence of the text above.",
    "What is the first sentence of this text?\n\n{text}",
]
TITLE = [
    "What is this text about? Answer with a few words.\n\n{text}",
    "Give this text a short title.\n\n{text}",
    "{text}\n\nName the subject of the text above.",
]
SIMPLE = [
    "Rewrite this sentence in simpler words.\n\n{text}",
    "Make this easier to read:\n\n{text}",
    "{text}\n\nSimplify the sentence above.",
]
REWRITE = [
    "Say this in other words.\n\n{text}",
    "Paraphrase this sentence:\n\n{text}",
    "{text}\n\nRewrite the sentence above.",
]
KEYWORDS = ["List five keywords of this text.\n\n{text}", "{text}\n\nWhat are the most important words in this text?"]
POINTS = ["List the main points of this text.\n\n{text}", "{text}\n\nWhat do we learn from this text? Make a short list."]
ASK = ["Write a question that this text answers.\n\n{text}", "{text}\n\nAsk one question about this text."]
ANSWER = [
    "Use this text to answer the question in one sentence.\n\n{text}\n\n{question}",
    "{text}\n\n{question}",
    "Read the text and answer the question.\n\nText: {text}\n\nQuestion: {question}",
    "Text: {text}\n\nQuestion: {question}\n\nAnswer with a few words from the text.",
]

OPEN = [
    "Tell me about {title}.",
    "What is {title}?",
    "Explain {title} in simple words.",
    "What should I know about {title}?",
    "Give me three facts about {title}.",
    "Write a short paragraph about {title}.",
    "Why is {title} important?",
    "Can you tell me something interesting about {title}?",
    "Describe {title} to a child.",
]
PEOPLE = [
    "Who was {title}?",
    "What is {title} known for?",
    "Tell me about {title}.",
    "Write a short biography of {title}.",
    "Why do people remember {title}?",
]
PLACES = ["Where is {title}?", "What can I see in {title}?", "Tell me about {title}.", "Write three sentences about {title}."]
# Questions that a lead answers.
ABOUT = {
    "People": ["Who was {title}?", "What is {title} known for?", "What did {title} do?", "When did {title} live?"],
    "Geography": ["Where is {title}?", "What is {title}?", "What is {title} known for?"],
    "History": ["What was {title}?", "When was {title}?", "Why was {title} important?"],
}
CREATIVE = ["Write a short story about {title}.", "Write a poem about {title}.", "Write a joke about {title}.", "Write a haiku about {title}."]

# Everyday questions: every wording with every word for it.
EVERYDAY = [
    (
        "How do I {0}?|What is the best way to {0}?|Give me some tips to {0}.|I want to {0}. Where do I start?|Explain step by step how to {0}.",
        "make a cup of tea|cook rice|bake bread|boil an egg|make pancakes|clean a window|remove a stain from a shirt|fix a flat tire|learn a new language|"
        "learn to play the guitar|sleep better|wake up early|save money|find a new job|write a letter|write a good email|prepare for an exam|"
        "train a puppy|take care of a cat|grow tomatoes|plant a tree|paint a wall|pack a suitcase|plan a trip|read more books|stay healthy|"
        "lose weight|drink more water|make new friends|speak in front of people|calm down|remember names|draw a face|take better photos|"
        "tie a tie|change a light bulb|save energy at home|recycle paper|start a garden|learn to swim|ride a bicycle|run a marathon|"
        "write a poem|tell a good story|choose a gift|organize my desk|clean my kitchen|make a budget|learn to code|keep a diary",
    ),
    (
        "What is the difference between {0}?|Can you compare {0}?|Tell me how {0} differ.",
        "a cat and a dog|a lake and a sea|a city and a village|tea and coffee|a fruit and a vegetable|a planet and a star|weather and climate|"
        "a novel and a poem|a bicycle and a car|butter and margarine|a violin and a guitar|summer and winter|a river and a canal|"
        "a frog and a toad|a virus and a bacterium|speed and velocity|mass and weight|a king and a president|gold and silver|salt and sugar",
    ),
    (
        "Why {0}?|Can you explain why {0}?|A child asks: why {0}? What would you say?",
        "is the sky blue|is the sea salty|do leaves turn red in autumn|do birds fly south|do we dream|do we need sleep|do cats purr|is ice slippery|"
        "does the moon change its shape|do we have seasons|do onions make us cry|is exercise good for us|do people laugh|does bread rise|"
        "do stars twinkle|do we yawn|is honey sweet|do dogs bark|does iron rust|are plants green|do volcanoes erupt|does it rain",
    ),
    (
        "Write a short message to {0}.|Help me write a few kind words to {0}.|What could I write to {0}?",
        "a friend who is ill|my mother on her birthday|my boss about a day off|a neighbour who helped me|a teacher to say thank you|a friend who moved away|"
        "my landlord about a broken heater|a customer whose order is late|a colleague who leaves|my grandmother at Christmas|a new neighbour|a friend after a fight",
    ),
    (
        "Give me five ideas for {0}.|I need ideas for {0}.|Suggest something for {0}.",
        "a birthday party|a rainy day|a quick dinner|a healthy breakfast|a weekend trip|a school project|a short story|a gift for a friend|"
        "a garden party|a vegetarian lunch|a family game night|a winter evening|a walk with children|a small business|the name of a cat",
    ),
    (
        "Hello! {0}|{0}|Hi there, a question: {0}|{0} Please keep it short.",
        "How are you today?|What can you help me with?|Can you cheer me up?|Tell me a joke.|Tell me a fun fact.|What should I cook tonight?|What is a good book to read?|"
        "I am bored. What can I do?|I feel tired today.|I cannot sleep.|I had a bad day.|What is your favourite season?|Do you know a riddle?|"
        "Can you write me a limerick?|What is a good hobby?|How many days are in a year?|What is the capital of France?|Who wrote Hamlet?|"
        "What is two plus two?|How many legs does a spider have?|What colour is a banana?|Name three fruits.|Name the planets of the solar system.|What do cows eat?",
    ),
]


def everyday():
    for wordings, words in EVERYDAY:
        for wording in wordings.split("|"):
            for word in words.split("|"):
                yield wording.format(word)


def facts(random):
    """Two people, two facts about each, and a question about one of them: text, question, answer."""
    people = random.sample(NAMES, 2)
    told, asked = [], []
    for person in people:
        for said, question, values in random.sample(FACTS, 2):
            value = random.choice(values)
            told.append(said.format(person, value))
            asked.append((question.format(person), value))
    random.shuffle(told)
    question, answer = random.choice(asked)
    return " ".join(told), question, answer


def notes(random, articles):
    """Notes of one line each, and a question about one of them: prompt, answer."""
    asked = random.choice(articles)
    lines = "\n".join(f"{a['title']}: {a['description']}" for a in articles)
    return f"Notes:\n{lines}\n\nWhat do the notes say about {asked['title']}? Copy it.", asked["description"]


def plain(title):
    """A title that can stand in a sentence: without what tells it from others."""
    return re.sub(r"\s*\(.*\)$", "", title)


def some_sentence(random, text):
    fit = [s for s in sentences(text) if 8 <= len(s.split()) <= 35]
    return random.choice(fit) if fit else None
