"""How questions are worded: for each kind, wordings to train on, and others for measurements."""

from __future__ import annotations

import numpy as np

TRAIN = 0
HELD_OUT = 1

FRAMES = (
    "{}",
    "{}",
    "{}",
    "{}",
    "{}",
    "Look at the picture. {}",
    "Here is a picture. {}",
    "Please answer. {}",
    "Question: {}",
    "{} Thanks!",
)
"""Around the wordings to train on, so that the question is what counts: half of the time there is
nothing."""

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (
        (
            "What colour is the {shape}?",
            "What color is the {shape}?",
            "Which colour does the {shape} have?",
            "The {shape} is of what color?",
            "Name the color of the {shape}.",
            "Say which colour the {shape} has.",
            "What is the colour of the {shape}?",
            "In what colour is the {shape} drawn?",
        ),
        ("Tell me the colour of the {shape}.",),
    ),
    "shape": (
        (
            "What shape is {colour}?",
            "Which shape is the {colour} one?",
            "What is the {colour} thing?",
            "Which {colour} shape is there?",
            "What kind of shape is the {colour} one?",
            "Tell me which shape is drawn in {colour}.",
            "What is {colour}?",
            "Say what the {colour} shape is.",
        ),
        ("Name the shape that is {colour}.",),
    ),
    "position": (
        (
            "Where is the {thing}?",
            "In which place is the {thing}?",
            "Where in the picture is the {thing}?",
            "Where do you see the {thing}?",
            "In what part of the image is the {thing}?",
            "Name the place of the {thing}.",
            "What is the position of the {thing}?",
            "Say where to find the {thing}.",
        ),
        ("Tell me where the {thing} is.",),
    ),
    "cell": (
        (
            "What is at the {place}?",
            "Which shape is at the {place}?",
            "What can be seen at the {place}?",
            "What is in the {place} of the picture?",
            "What do you see at the {place}?",
            "Say what is at the {place}.",
            "Name what lies at the {place}.",
            "Is there anything at the {place}, and what is it?",
        ),
        ("Tell me what is at the {place}.",),
    ),
    "count": (
        (
            "How many {things} are there?",
            "How many {things} do you see?",
            "Count the {things}.",
            "How many {things} does the picture show?",
            "How many {things} are in the image?",
            "Tell me how many {things} there are.",
            "What is the count of {things}?",
            "Give the number of {things}.",
            "Number of {things}?",
        ),
        ("What is the number of {things} in the picture?",),
    ),
    "exists": (
        (
            "Is there a {thing}?",
            "Does the picture show a {thing}?",
            "Do you see a {thing}?",
            "Is a {thing} in the image?",
            "Can you find a {thing}?",
            "Does the image have a {thing} in it?",
            "Tell me whether there is a {thing}.",
            "Is there a {thing} anywhere in the picture?",
        ),
        ("Can a {thing} be seen?",),
    ),
    "relation": (
        (
            "Is the {thing} {side} the {other}?",
            "Does the {thing} lie {side} the {other}?",
            "Is the {thing} somewhere {side} the {other}?",
            "Do you see the {thing} {side} the {other}?",
            "Tell me whether the {thing} is {side} the {other}.",
            "Does the picture show the {thing} {side} the {other}?",
            "Is it true that the {thing} is {side} the {other}?",
        ),
        ("Would you say that the {thing} is {side} the {other}?",),
    ),
    "number": (
        (
            "What number is this?",
            "Which number is shown?",
            "Read the number.",
            "What number do you see?",
            "What is the number?",
            "Which number does the picture show?",
            "Say which number is written here.",
            "Name the number in the image.",
            "Tell me which number this is.",
        ),
        ("Tell me the number in the picture.",),
    ),
    "number colour": (
        (
            "What colour is the number?",
            "What color is the number?",
            "Which colour do the digits have?",
            "In which color is the number written?",
            "Name the colour of the number.",
            "What is the color of the digits?",
            "Say which colour the number has.",
        ),
        ("Tell me the colour of the number.",),
    ),
    "digits": (
        (
            "How many digits does the number have?",
            "How many digits are there?",
            "Count the digits.",
            "How many digits do you see?",
            "Give the number of digits.",
            "Tell me how many digits the number has.",
            "What is the count of digits?",
            "Of how many digits is the number made?",
        ),
        ("What is the number of digits?",),
    ),
    "tallest": (
        (
            "What is the tallest bar?",
            "Which bar is the tallest?",
            "Which colour has the tallest bar?",
            "What colour is the tallest bar?",
            "Which bar is the largest?",
            "Name the tallest bar.",
            "Which bar is taller than the others?",
            "Tell me which bar has the greatest height.",
            "What is the highest of the bars?",
            "Which bar has the highest value?",
        ),
        ("Name the bar that is taller than all others.", "Which bar is the highest?"),
    ),
    "shortest": (
        (
            "What is the shortest bar?",
            "Which bar is the shortest?",
            "Which colour has the shortest bar?",
            "What colour is the shortest bar?",
            "Which bar is the smallest?",
            "Name the shortest bar.",
            "Which bar is shorter than the others?",
            "Tell me which bar has the least height.",
            "What is the lowest of the bars?",
            "Which bar has the lowest value?",
        ),
        ("Name the bar that is shorter than all others.", "Which bar is the lowest?"),
    ),
    "bars": (
        (
            "How many bars are there?",
            "How many bars does the chart have?",
            "Count the bars.",
            "How many bars do you see?",
            "Give the number of bars.",
            "Tell me how many bars the chart has.",
            "What is the count of bars?",
            "How many bars are in the picture?",
        ),
        ("What is the number of bars?",),
    ),
    "height": (
        (
            "How tall is the {colour} bar?",
            "What is the height of the {colour} bar?",
            "How high is the {colour} bar?",
            "What value does the {colour} bar have?",
            "What is the value of the {colour} bar?",
            "Say how tall the {colour} bar is.",
            "Give the height of the {colour} bar.",
            "Tell me how high the {colour} bar is.",
        ),
        ("Tell me the value of the {colour} bar.",),
    ),
    "taller": (
        (
            "Is the {colour} bar taller than the {other} one?",
            "Is the {colour} bar taller than the {other} bar?",
            "Is the {colour} bar higher than the {other} one?",
            "Does the {colour} bar have a greater height than the {other} bar?",
            "Tell me whether the {colour} bar is taller than the {other} one.",
            "Is it true that the {colour} bar is higher than the {other} bar?",
            "Does the {colour} bar reach higher than the {other} one?",
            "Does the {colour} bar end higher up than the {other} bar?",
            "Compare the {colour} bar with the {other} one: is it taller?",
            "Is the value of the {colour} bar greater than that of the {other} one?",
            "Does the {colour} bar surpass the {other} one?",
            "Of the {colour} bar and the {other} bar, is the first the taller?",
        ),
        ("Does the {colour} bar rise above the {other} one?",),
    ),
    "description": (
        (
            "Describe the picture.",
            "Describe this image in detail.",
            "What do you see in the picture?",
            "What does the picture show?",
            "Please describe what is shown here.",
            "Write a description of this picture.",
            "What is in this picture?",
            "What is this?",
            "Say in full what the image shows.",
            "Describe everything that you see.",
            "Tell somebody who is blind what is in the image.",
            "What can be seen in this image?",
            "Give a detailed description.",
            "Explain what is in the picture.",
        ),
        (
            "Give a full account of this image.",
            "Tell me everything that you can see here.",
            "Explain this picture to somebody who cannot see it.",
            "Report what is in the image, with all details.",
        ),
    ),
    "list": (
        (
            "List what is in the picture, one item per line.",
            "Make a list of what the picture shows.",
            "List everything in this image.",
            "Write a list of the things in the image.",
            "Show me a list of what you see.",
            "List all that is shown, line by line.",
            "What is in the picture? Answer with a list.",
            "Enumerate what the image shows.",
        ),
        (
            "Give me a list of all that is to be seen in this picture.",
            "Put what the image shows into a list.",
        ),
    ),
}
KINDS = tuple(WORDINGS)
COMPARISONS = ("relation", "taller")
LONG_KINDS = (
    "description",
    "list",
)  # their answers take 40 tokens and more on pictures that hold enough


def worded(kind: str, parts: dict[str, str], wordings: int, rng: np.random.Generator) -> str:
    """A question of a kind in one of its wordings, TRAIN (in a frame) or HELD_OUT."""
    asked = str(rng.choice(WORDINGS[kind][wordings])).format(**parts)
    return str(rng.choice(FRAMES)).format(asked) if wordings == TRAIN else asked
