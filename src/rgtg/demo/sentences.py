"""The sentences of the demo: what customers write, and what the support desk replies."""

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Mary", "Nina",
    "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Xavier", "Yara", "Zoe", "Alan",
    "Bella", "Carl", "Diana",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow")
THINGS = (
    "backpack", "kettle", "lamp", "toaster", "blender", "jacket", "watch", "keyboard", "printer", "camera", "speaker",
    "tent", "bicycle", "scooter", "sofa", "mattress", "heater", "fan", "phone", "tablet", "drill", "mixer", "guitar",
    "chair",
)  # fmt: skip

OPENINGS = (
    "Hello.", "Hi there.", "Good morning.", "Good evening.", "I hope you are well.", "This is urgent.",
    "I am very upset.", "Please help me.",
)  # fmt: skip
INTRODUCTIONS = ("My name is {name}.", "This is {name}.", "I am {name}.", "It is {name} again.")
ENDINGS = ("Can you help me?", "What can you do?", "Please let me know.", "Thank you.", "I am waiting for your answer.")
RECENT = ("I bought it last week.", "I bought it three days ago.", "I bought it yesterday.", "It is quite new.")
OLD = ("I bought it last year.", "I bought it two years ago.", "I have had it for years.", "It is quite old.")

PROBLEMS = {
    "broken": (
        "My {product} has stopped working.", "My {product} is broken.", "There is a crack in my {product}.",
        "A part of my {product} fell off.",
    ),
    "missing": (
        "My {product} has not arrived.", "I am still waiting for my {product}.",
        "The parcel with my {product} is lost.",
    ),
    "unwanted": (
        "I no longer want my {product}.", "I want to return my {product}.", "I do not like my {product} any more.",
    ),
    "charged": (
        "I was charged twice for my {product}.", "I have paid for my {product} two times.",
        "You took the money for my {product} twice.",
    ),
    "swapped": (
        "I ordered a {product} but you sent me a {other}.", "I got a {other} and not my {product}.",
        "You sent a {other} in place of my {product}.",
    ),
    "unclear": (
        "I do not know how to use my {product}.", "How do I set up my {product}?", "I cannot understand my {product}.",
    ),
}  # fmt: skip
AT_FAULT = frozenset({"broken", "missing", "charged", "swapped"})

GREETINGS = (
    "Hello {name}, thank you for your message.", "Dear {name}, thank you for writing to us.",
    "Hi {name}, thanks for getting in touch.",
)  # fmt: skip
REMEDIES = {
    "replace": ("We will send you a new {product} today.", "We will replace your {product} free of charge."),
    "repair": ("Our workshop will repair your {product}.", "Please send us your {product} and we will mend it."),
    "trace": ("We will trace the parcel with your {product}.", "We are asking the courier where your {product} is."),
    "refund": ("We will refund the price of your {product}.", "You can return your {product} for a full refund."),
    "decline": ("It is too late to return your {product}.", "Sadly we can no longer take back your {product}."),
    "repay": (
        "We will pay back the second charge for your {product}.",
        "The second payment for your {product} will be returned to you.",
    ),
    "exchange": (
        "We will exchange the wrong item for your {product}.",
        "We will collect the wrong item and send your {product}.",
    ),
    "instruct": (
        "We will email you the instructions for your {product}.",
        "You can find the guide for your {product} on our website.",
    ),
}
# Every sentence of the desk, by kind; the gold reward counts these kinds.
SENTENCES: dict[str, tuple[str, ...]] = {
    "greeting": GREETINGS,
    "thanks": ("Thank you for your message.", "Thanks for getting in touch."),
    "apology": (
        "I am sorry about your {product}.", "We are sorry for the trouble with your {product}.",
        "I am sorry to hear this.",
    ),
    "reproach": (
        "You should have been more careful with your {product}.", "This is not our problem.",
        "Please stop complaining.",
    ),
    "promise": (
        "It will certainly be done by tomorrow.", "Your next order will be free.",
        "We will also give you one hundred pounds.",
    ),
    "time": ("This will take about five days.", "This may take up to two weeks."),
    "closing": ("Kind regards, the support team.", "Best wishes, the support team."),
    "dismissal": ("Do not write again.", "We have no time for this."),
    **REMEDIES,
}  # fmt: skip
