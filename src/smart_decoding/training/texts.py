"""The texts that self-written conversations start from.

Written for this project; none of it comes from a benchmark.
"""

from __future__ import annotations

# {name}, {n}, {thing}, {verb}, {noun} and {topic} are drawn anew each time.
OPENINGS = (
    "Write a Python function that",
    "Can you explain how",
    "What is the difference between",
    "I have a list of",
    "Write a short story about",
    "Give me {n} tips for",
    "How do I",
    "Why do people",
    "Summarize the history of",
    "Write an email to {name} about",
    "Help me plan",
    "Write a poem about",
    "Translate into simple English:",
    "Solve this step by step:",
    "A farmer has {n}",
    "A train leaves",
    "Write a class in Python for",
    "Fix the bug in this code:\n```python\ndef {verb}_{noun}(",
    "Describe the process of",
    "List the main causes of",
    "What are the advantages and disadvantages of",
    "Imagine that you are",
    "Compare",
    "My friend {name} wants to",
    "Write a product description for",
    "Explain to a child why",
    "Create a recipe for",
    "What should I do if",
    "Write a SQL query that",
    "Write a JavaScript function to {verb}",
    "Outline an essay on",
    "Make this sentence more formal:",
    "Suggest names for",
    "How many",
    "Calculate",
    "{name} bought {n} {thing} and",
    "In a school with {n} students,",
    "Give an example of",
    "Who was",
    "When did",
    "Write a dialogue between",
    "Make a table of",
    "Prove that",
    "Write unit tests for",
    "Convert",
    "What happens when",
    "Is it true that",
    "Explain this code:\n```python\nfor {noun} in",
    "Write a cover letter for a job as",
    "Where can I",
    "Give feedback on this paragraph:",
    "Design an experiment to",
    "Write a function in C that",
    "{name} has {n} {thing}.",
    "{name} and {name} share {n} {thing}.",
    "Every day {name} sells {n} {thing} for",
    "There are {n} {thing} in a box.",
    "{name} is {n} years old.",
    "{name} earns ${n} a week",
    "A shop sells {thing} for ${n} each.",
    "It takes {name} {n} minutes to",
    "{name} drives {n} miles",
    "{name} reads {n} pages",
    "A recipe for {n} people needs",
    "Last year {name} collected {n} {thing}.",
    "If {n} {thing} cost ${n},",
    "{name} has twice as many {thing} as {name}.",
    "What percentage of",
    "Finish this Python function:\n```python\ndef {verb}_{noun}(",
    "Here is the start of a program:\n```python\n",
    "```python\ndef {verb}_{noun}(",
    "Implement `{verb}_{noun}` in Python. It should",
    "Write a Python program to {verb} the {noun}",
    "Please write code to {verb} a {noun} that",
    "Finish this code.\n```python\nfrom typing import List\n\n\ndef {verb}_{noun}(",
    "Add a docstring to this function:\n```python\ndef {verb}_{noun}(",
    "Given a {noun}, return",
    "Given two {noun}s, write a function",
    "I am learning about {topic} and",
    "What does the word",
    "Can you recommend",
    "I need a speech for",
    "Write a review of",
    "Describe a day in the life of",
    "Continue this story: {name} opened the door and",
    "Write a letter from {name} to",
    "What would happen if",
    "Make a list of",
    "Give {name} some advice on",
    "My neighbour",
    "I feel",
    "Tell me a joke about",
    "Write a news report about",
    "How can a small company",
    "Explain the idea behind",
    "Which is better,",
    "Write instructions for",
    "Turn these notes into an email:",
    "Correct the grammar:",
    "Classify the following",
    "Extract the names from this text:",
    "Summarize this text:",
    "Write a headline for",
    "Paraphrase:",
)

TASKS = (
    "Explain {} in simple words.",
    "Write a Python function about {} with a docstring and an example.",
    "Give me a list of ten facts about {}.",
    "Write a short story in which {} plays a role.",
    "What are common misunderstandings about {}?",
    "Write a short poem about {}.",
    "Describe {} to someone who has never heard of it.",
    "What are the pros and cons of {}?",
    "Make a study plan for learning about {}.",
    "Write a polite email that asks a colleague about {}.",
    "Invent a word problem about {} with numbers, then solve it step by step.",
    "Write a dialogue between a teacher and a student about {}.",
    "Summarize the most important ideas behind {}.",
    "How has {} changed over the last hundred years?",
    "Write a Python class that models {}.",
    "Give step-by-step instructions for {}.",
    "Which questions should I ask an expert on {}?",
    "Write a blog post of three paragraphs about {}.",
    "Write code that simulates {} and explain each line.",
    "Suggest three projects for beginners that have to do with {}.",
    "Why does {} matter?",
    "Compare {} with something similar.",
    "Write a speech of one minute about {}.",
    "What is the history of {}?",
    "Explain {} to a six-year-old.",
    "Give me a quiz of five questions about {}, with answers.",
    "Write a product description that mentions {}.",
    "Write a JavaScript function that deals with {}.",
    "What could go wrong with {}?",
    "Write a letter to a newspaper about {}.",
    "List the vocabulary one needs for {}.",
    "Write a Python script that prints a table about {}.",
    "What should a beginner know about {}?",
    "Tell me something surprising about {}.",
    "Write a scene of a play about {}.",
    "How would you measure {}?",
    "Write a function that validates data about {} and raises an error if it is wrong.",
    "Solve a simple arithmetic exercise about {} and show your work.",
    "How does {} affect daily life?",
    "Write an outline for a book about {}.",
    "Give an example that illustrates {}.",
    "Is {} useful? Argue both sides.",
)

IMAGE_TASKS = (
    "Describe the picture.",
    "Describe this image in detail.",
    "What do you see?",
    "What is happening here?",
    "What is in the foreground, and what behind it?",
    "Which colours and shapes stand out?",
    "Is there any text? Read it.",
    "List everything in this image.",
    "How many things of each kind are there?",
    "Where and when may this be?",
    "Write a caption for this picture.",
    "Tell a short story that begins with this scene.",
    "What is unusual here?",
    "What might happen next?",
    "Explain this picture to somebody who cannot see it.",
    "Ask three questions about it.",
)

_TOPICS = """
photosynthesis, bread baking, sorting numbers, prime numbers, the water cycle, chess, bicycle
repair, compound interest, bird migration, volcanoes, string reversal, public libraries, electric
cars, coffee, the moon, binary search, gardening, time zones, recycling, jazz music, a bank account,
shopping lists, matrix multiplication, weather forecasts, dinosaurs, train travel, budgeting,
palindromes, the Roman Empire, vaccines, a stack and a queue, marathon training, black holes, honey
bees, word counting, job interviews, solar panels, knitting, fractions, temperature conversion,
robots, tea, dictionaries and hash tables, the heart, lighthouses, recursion, savings goals, dogs,
mountain hiking, linked lists, earthquakes, friendship, painting a room, random walks, the French
Revolution, sleep, date parsing, inventory management, rainbows, negotiation, a school timetable,
tides, file compression, cooking rice, voting systems, graph traversal, sharks, photography, unit
conversion, remote work, a parking garage, DNA, email validation, snow, the printing press,
percentages, meditation, a deck of cards, steam engines, text adventure games, speed and distance,
nutrition, clouds, a to-do list, tax returns, Fibonacci numbers, whales, password generators,
theatre, mixing paint, moving house, gravity, cheese, opera, bubble sort, glaciers, folk tales,
washing machines, averages and medians, the Silk Road, antibiotics, roman numerals, fishing, wind
turbines, poetry, a library catalogue, the stock market, magnets, swimming, the Great Wall, bridges,
anagrams, deserts, yoga, parsing CSV files, the human eye, street markets, calendars, kites, leap
years, penguins, insurance, drums, rivers, counting vowels, the Industrial Revolution, muscles,
train tickets, prime factors, soap, cats, a chat bot, elevators, sunflowers, the Olympic Games,
triangles, mirrors, ice cream, merge sort, castles, batteries, pottery, the alphabet, a vending
machine, ants, sailing, logic gates, wool, mushrooms, a calculator, elections, hurricanes, pizza,
satellites, set operations, the nervous system, bus routes, ratios, origami, plastic waste, a phone
book, horses, museums, coral reefs, nested lists, the Renaissance, bones, hotel bookings, area and
perimeter, chocolate, foxes, traffic lights, echoes, running a cafe, regular expressions, coins,
blood pressure, comic books, the periodic table, basketball, bamboo, random passwords, Ancient
Egypt, noise, ferry schedules, probability, jam, elephants, clocks, fog, camping, JSON files, maps,
allergies, dance, simple machines, football, oak trees, a tic-tac-toe board, the Vikings, memory,
parcel delivery, exponents, olive oil, owls, locks and keys, lightning, school lunches, string
formatting, stamps, exercise, film making, acids and bases, tennis, moss, a guessing game, the Space
Race, dreams, car rental, geometry, salt, turtles, umbrellas, waves, public parks, list
comprehensions, flags, first aid, graphic design, evaporation, rock climbing, roses, a spell
checker, the Aztecs, language learning, airport queues, discounts, honey, spiders, candles,
avalanches, neighbourhood festivals, file systems, money transfers, hand washing, songwriting,
density, cycling, seeds
"""
TOPICS = tuple(topic.strip() for topic in _TOPICS.replace("\n", " ").split(","))

_NAMES = """
Anna Ben Carla David Elena Farid Grace Hugo Iris Jonas Karim Lena Marco Nadia Oscar Priya Quinn Rosa
Samir Tara Umar Vera Will Xenia Yusuf Zoe Maria Tom Sofia Leo Emma Noah Mia Lucas Amir Julia Peter
Sara Daniel Ruth
"""
NAMES = tuple(_NAMES.split())

_THINGS = """
apples books pencils marbles stickers eggs cookies tickets bottles flowers coins cards chairs shirts
boxes stamps oranges toys candles notebooks sandwiches bricks
"""
THINGS = tuple(_THINGS.split())

_VERBS = """
find count remove sort merge split reverse check sum filter convert compute group rotate validate
parse format compare replace search update print max is get build encode flatten rank average
"""
VERBS = tuple(_VERBS.split())

_NOUNS = """
list word string number matrix digit vowel file date price score list_of_words interval character
tree dictionary sentence array sequence pair total grid name prime bracket letter triangle duplicate
element substring
"""
NOUNS = tuple(_NOUNS.split())
