"""Prompts of our own, for when no file is given: what people ask a chat model, of several kinds and lengths."""

from __future__ import annotations

PROMPTS = (
    "Explain to a ten-year-old why the sky is blue at noon and red in the evening.",
    "Write a short letter to a neighbour whose dog barks at night. Be friendly, say what the problem is, and offer two "
    "ways in which it could be solved.",
    "What is the difference between a virus and a bacterium, and why do antibiotics help against only one of them?",
    "Give me a recipe for a vegetable soup for four people that takes less than an hour. List the ingredients first, "
    "with amounts, and then the steps.",
    "A train leaves a station at 9:40 and travels at 80 kilometres an hour. A second one leaves the same station at "
    "10:10 and follows it at 110 kilometres an hour. When does the second catch up with the first? Show each step.",
    "Summarise the following in one sentence: The harbour was built in 1871 for the herring trade. When the herring "
    "left, the town turned to building boats, and when steel replaced wood it turned to repairing them. Today most of "
    "the sheds are flats, and the last yard restores old sailing ships for museums.",
    "Write a Python function that takes a list of numbers and returns the length of its longest increasing run. "
    "Explain what it does for an empty list.",
    "Translate into plain English: 'The party of the first part shall indemnify and hold harmless the party of the "
    "second part against any and all claims arising from the use of the premises.'",
    "Name five questions that I should ask before I rent a flat, and say why each of them matters.",
    "Tell a story in which a lighthouse keeper finds a letter in a bottle. It should begin on a stormy night and end "
    "with a decision.",
    "How does a refrigerator move heat from a cold place to a warm one? Describe the four parts of the cycle.",
    "I have forty minutes three times a week and no equipment. Plan four weeks of exercise for a beginner whose knees "
    "hurt when running.",
    "Which of these is heaviest, and how do you know: a litre of oil, a litre of water, or a litre of honey?",
    "Rewrite this to be half as long and polite: 'I have asked you three times already for the figures of last month "
    "and I still have not got them, so if they are not here by tomorrow I will have to tell the whole committee that "
    "it was you who kept everyone waiting.'",
    "Explain what a hash table is, what happens when two keys fall into the same slot, and two ways to deal with it.",
    "Describe the water cycle as if you were a drop that has just fallen on a mountain.",
    "What should I consider when choosing between a fixed and a variable interest rate for a loan of ten years?",
    "Compare the piano and the harpsichord: how each makes its sound, and what a player can do on one but not on the "
    "other.",
    "Write a SQL query that lists customers who ordered in March but not in April, with the number of their orders. "
    "The tables are customers (id, name) and orders (id, customer_id, ordered_on, amount).",
    "My tomato plants have yellow leaves at the bottom and green ones at the top. What are the likely causes, and how "
    "can I tell which one it is?",
    "Write eight lines of verse about a bicycle that has been left in the rain.",
    "Give the arguments for and against a four-day working week, three each, and then say which you find strongest.",
    "A bag holds five red, four blue and three green balls. Two are drawn without looking and are not put back. What "
    "is the probability that both have the same colour?",
    "Make a checklist for moving house, beginning two months before the day and ending one week after it.",
    "Why do we have leap years, and why was 1900 not one although 2000 was?",
    "Write the opening paragraph of a talk for people who have never programmed, about what an algorithm is. Use a "
    "kitchen as the example.",
    "Here are the notes of a meeting; turn them into a list of who does what by when. Anna will ask the printer for a "
    "price before Friday. We need pictures: Tom has some, he sends them tomorrow. The text is nearly done, Mary reads "
    "it over the weekend. Next meeting on Tuesday, Anna books the room.",
    "What happens in the body in the first half hour after somebody stops holding their breath under water?",
    "Suggest a three-day visit to a city with many museums for a family with one small child and one teenager.",
    "Explain the rule of offside in football to somebody who has never watched a match.",
    "I wrote `for i in range(len(items)): if items[i] == x: items.remove(x)` and it sometimes skips elements. Why, and "
    "how do I do it properly?",
    "Which planets can be seen without a telescope, and how can I tell them from stars?",
    "Write a product description for a wooden desk lamp in two versions: one sober, for a catalogue, and one playful, "
    "for a shop window.",
    "How do noise-cancelling headphones work, and why are they better at the drone of an engine than at voices?",
    "Classify each of these reviews as positive, negative or mixed, with a word of reason: 'Came late but works well.' "
    "'Broke on the second day.' 'My mother loves it.' 'Good sound, terrible manual.'",
    "Imagine that you are a guide in an old mill. Welcome a school class and explain how grain becomes flour.",
    "What is compound interest? Show with an example how much 1,000 grows in ten years at 4 percent, and how much of "
    "it is interest on interest.",
    "Draft an apology from a small bakery whose bread was delivered a day late to a wedding, with an offer that is "
    "generous but does not ruin the bakery.",
    "Explain the difference between weather and climate, and why a cold winter says little about the second.",
    "List the steps for changing the tube of a bicycle tyre by the side of the road, with the mistakes that beginners "
    "make at each.",
)
