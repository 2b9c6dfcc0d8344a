"""What self-written conversations start from: openings of a user's turn that the target itself completes, and whole
turns built from a task and a topic. Written for this project; none of it comes from a benchmark.
"""

from __future__ import annotations

import numpy as np

OPENINGS = (
    "Write a Python function that", "Can you explain how", "What is the difference between",
    "I have a list of numbers and I want to", "Write a short story about", "Give me five tips for", "How do I",
    "Why do people", "Summarize the history of", "Write an email to", "Help me plan", "Write a poem about",
    "Translate into simple English:", "Solve this step by step:", "A farmer has", "A train leaves",
    "Write a class in Python for", "Fix the bug in this code:", "Describe the process of", "List the main causes of",
    "What are the advantages and disadvantages of", "Imagine that you are", "Compare",
    "Write a product description for", "Explain to a child why", "Create a recipe for", "What should I do if",
    "Write a SQL query that", "Write a JavaScript function to", "Outline an essay on",
    "Rewrite this sentence so that it sounds more formal:", "Suggest names for", "How many", "Calculate",
    "Tom bought", "In a school with", "Give an example of", "Who was", "When did", "Write a dialogue between",
    "Make a table of", "Prove that", "Write unit tests for", "Explain this code:", "Convert", "What happens when",
    "Write a cover letter for a job as", "Give feedback on this paragraph:", "Design an experiment to",
    "Write a function in C that",
)  # fmt: skip

TASKS = (
    "Explain {} in simple words.", "Write a Python function about {} with a docstring and an example.",
    "Give me a list of ten facts about {}.", "Write a short story in which {} plays a role.",
    "What are common misunderstandings about {}?", "Write a short poem about {}.",
    "Describe {} to someone who has never heard of it.", "What are the pros and cons of {}?",
    "Make a study plan for learning about {}.", "Write a polite email that asks a colleague about {}.",
    "Invent a word problem about {} with numbers, then solve it step by step.",
    "Write a dialogue between a teacher and a student about {}.", "Summarize the most important ideas behind {}.",
    "How has {} changed over the last hundred years?", "Write a Python class that models {}.",
    "Give step-by-step instructions for {}.", "Which questions should I ask an expert on {}?",
    "Write a blog post of three paragraphs about {}.", "Write code that simulates {} and explain each line.",
    "Suggest three projects for beginners that have to do with {}.",
)  # fmt: skip

TOPICS = (
    "photosynthesis", "bread baking", "sorting numbers", "prime numbers", "the water cycle", "chess",
    "bicycle repair", "compound interest", "bird migration", "volcanoes", "string reversal", "public libraries",
    "electric cars", "coffee", "the moon", "binary search", "gardening", "time zones", "recycling", "jazz music",
    "a bank account", "shopping lists", "matrix multiplication", "weather forecasts", "dinosaurs", "train travel",
    "budgeting", "palindromes", "the Roman Empire", "vaccines", "a stack and a queue", "marathon training",
    "black holes", "honey bees", "word counting", "job interviews", "solar panels", "knitting", "fractions",
    "temperature conversion", "robots", "tea", "dictionaries and hash tables", "the heart", "lighthouses",
    "recursion", "savings goals", "dogs", "mountain hiking", "linked lists", "earthquakes", "friendship",
    "painting a room", "random walks", "the French Revolution", "sleep", "date parsing", "inventory management",
    "rainbows", "negotiation", "a school timetable", "tides", "file compression", "cooking rice", "voting systems",
    "graph traversal", "sharks", "photography", "unit conversion", "remote work", "a parking garage", "DNA",
    "email validation", "snow", "the printing press", "percentages", "meditation", "a deck of cards", "steam engines",
    "text adventure games", "speed and distance", "nutrition", "clouds", "a to-do list", "tax returns",
    "Fibonacci numbers", "whales", "password generators", "theatre", "mixing paint", "moving house",
)  # fmt: skip


def user_turn(rng: np.random.Generator) -> tuple[str, bool]:
    """A user's turn and whether it is complete (false: an opening that the target completes)."""
    if rng.random() < 0.4:
        return str(rng.choice(OPENINGS)), False
    return str(rng.choice(TASKS)).format(rng.choice(TOPICS)), True
