"""Everyday questions with an answer of one sentence, for tables whose task files hold none.

A router that has only seen tasks takes "Why is the sky blue?" for one of them. Written for this project.
"""

# ruff: noqa: E501 (tables: an entry a line)
from __future__ import annotations

from signalbox.router.table import fraction_of
from signalbox.router.texts import Text, made_text

WHAT_IS = (
    "What is {thing}?",
    "Explain {thing} in simple words.",
    "Can you tell me what {thing} is?",
    "Describe {thing} in one sentence.",
)
CAPITAL = ("What is the capital of {thing}?", "Name the capital city of {thing}.", "Which city is {thing}'s capital?")

THINGS = {
    "photosynthesis": "Photosynthesis is how plants use sunlight, water and carbon dioxide to make sugar and oxygen.",
    "gravity": "Gravity is the force that pulls objects with mass towards each other, such as an apple to the ground.",
    "a volcano": "A volcano is an opening in the Earth's crust through which hot lava, ash and gas can escape.",
    "inflation": "Inflation is a general rise in prices over time, so that the same money buys fewer things.",
    "democracy": "Democracy is a form of government in which the people choose their leaders by voting.",
    "an atom": "An atom is the smallest piece of a chemical element, made of a nucleus with electrons around it.",
    "the water cycle": "The water cycle is the movement of water from the sea to the air, to rain, and back to the sea.",
    "a black hole": "A black hole is a region of space whose gravity is so strong that not even light can escape.",
    "evolution": "Evolution is the slow change of living things over generations through inherited differences.",
    "electricity": "Electricity is the flow of tiny charged particles called electrons through a material.",
    "a vaccine": "A vaccine trains the immune system to recognise a disease without making the person ill.",
    "the internet": "The internet is a worldwide network of computers that exchange data with each other.",
    "a computer virus": "A computer virus is a program that copies itself and can damage or steal data.",
    "machine learning": "Machine learning lets computers find patterns in examples instead of following fixed rules.",
    "a database": "A database is an organised collection of data that can be searched and changed quickly.",
    "recursion": "Recursion is when a function solves a problem by calling itself on a smaller part of it.",
    "a metaphor": "A metaphor describes one thing as if it were another to show what they have in common.",
    "a haiku": "A haiku is a short Japanese poem of three lines with five, seven and five syllables.",
    "jazz": "Jazz is a style of music from New Orleans known for improvisation, swing and blue notes.",
    "an orchestra": "An orchestra is a large group of musicians who play strings, woodwinds, brass and percussion.",
    "the Renaissance": "The Renaissance was a time of great art, science and learning in Europe after the Middle Ages.",
    "the Roman Empire": "The Roman Empire ruled much of Europe, North Africa and the Near East for several centuries.",
    "the solar system": "The solar system is the Sun together with the planets, moons and other bodies around it.",
    "a comet": "A comet is a ball of ice and dust that grows a bright tail when it comes near the Sun.",
    "climate change": "Climate change is a long-term shift in temperature and weather, today caused mostly by people.",
    "recycling": "Recycling means turning waste such as paper, glass or metal into material for new things.",
    "yoga": "Yoga is a practice from India that joins movement, breathing and attention.",
    "meditation": "Meditation is the practice of resting the mind on one thing, such as the breath.",
    "a budget": "A budget is a plan of how much money comes in and how it will be spent.",
    "compound interest": "Compound interest is interest that is paid on the savings and on earlier interest as well.",
    "a solar eclipse": "A solar eclipse happens when the Moon passes between the Sun and the Earth and hides the Sun.",
    "DNA": "DNA is the long molecule in our cells that carries the instructions for building a living thing.",
    "the heart": "The heart is a muscle that pumps blood through the body to bring oxygen to every part.",
    "sleep": "Sleep is a state of rest in which the body repairs itself and the brain sorts what was learned.",
    "a rainbow": "A rainbow appears when sunlight is split into its colours by drops of rain in the air.",
    "an earthquake": "An earthquake is a shaking of the ground caused by sudden movement along a fault in the crust.",
    "bread": "Bread is a food made by baking a dough of flour, water and usually yeast.",
    "chess": "Chess is a board game for two players who each try to trap the other's king.",
    "a marathon": "A marathon is a running race over a distance of about forty-two kilometres.",
    "the Moon": "The Moon is the Earth's natural satellite, which circles it about once a month.",
}
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Argentina": "Buenos Aires",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Australia": "Canberra",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Turkey": "Ankara",
    "Cuba": "Havana",
    "Iceland": "Reykjavik",
    "Hungary": "Budapest",
}
ASKED = {
    "Why is the sky blue?": "The sky is blue because air scatters the short blue waves of sunlight more than the red.",
    "Why is the sea salty?": "The sea is salty because rivers carry dissolved minerals from rocks into it.",
    "Why do leaves change colour in autumn?": "Leaves lose their green chlorophyll in autumn, and other colours show.",
    "Why do cats purr?": "Cats purr when they are content, and sometimes to calm themselves.",
    "Why do we dream?": "Nobody knows for sure, but dreams may help the brain to sort memories and feelings.",
    "Why is exercise good for you?": "Exercise strengthens the heart and muscles and lifts the mood.",
    "How do planes fly?": "The shape and angle of the wings push air down, and the air pushes the plane up.",
    "How does a microwave oven work?": "It sends waves through the food that make its water molecules move and heat up.",
    "How do bees make honey?": "Bees collect nectar from flowers and dry it in the hive until it is honey.",
    "How can I learn a new language?": "Practise a little every day, listen often, and speak with others as soon as you can.",
    "How do I boil an egg?": "Put the egg into boiling water and take it out after seven to ten minutes.",
    "How can I sleep better?": "Go to bed at the same time each day and keep the room dark, cool and quiet.",
    "How do I write a good letter?": "Say clearly why you write, keep it short, and close with what you hope for.",
    "Who wrote Romeo and Juliet?": "Romeo and Juliet was written by William Shakespeare.",
    "Who painted the Mona Lisa?": "The Mona Lisa was painted by Leonardo da Vinci.",
    "Who was Albert Einstein?": "Albert Einstein was a physicist who developed the theory of relativity.",
    "When did the Second World War end?": "The Second World War ended in 1945.",
    "Where do penguins live?": "Most penguins live in the southern half of the world, many of them in Antarctica.",
    "How many continents are there?": "There are seven continents.",
    "What is the largest ocean?": "The Pacific Ocean is the largest ocean on Earth.",
    "What is the tallest mountain in the world?": "Mount Everest is the tallest mountain above sea level.",
    "What is the longest river in Africa?": "The Nile is the longest river in Africa.",
    "What do pandas eat?": "Pandas eat mostly bamboo.",
    "What should I cook tonight?": "You could cook pasta with tomatoes, garlic and basil, which is quick and tasty.",
    "Give me three tips for a job interview.": "Learn about the company, prepare examples of your work, and be on time.",
    "Tell me an interesting fact.": "An octopus has three hearts and blue blood.",
    "Tell me a joke.": "Why did the bicycle fall over? Because it was two tired.",
    "Write a haiku about the sea.": "Waves breathe in and out, a gull hangs above the foam, the tide keeps its time.",
    "Write a short poem about spring.": "The snow is gone, the brook runs clear, the blackbird sings that spring is here.",
    "Hello!": "Hello! How can I help you today?",
    "Hi, how are you?": "I am doing well, thank you. How can I help you?",
    "Good morning": "Good morning! What can I do for you today?",
    "Thank you very much": "You are welcome! Let me know if there is anything else.",
    "Who are you?": "I am an assistant that answers questions and helps with writing.",
    "What can you do?": "I can answer questions, explain things, and help you to write.",
    "Can you help me?": "Of course. What do you need help with?",
    "I feel sad today.": "I am sorry to hear that. Would you like to tell me what happened?",
    "Summarise the plot of Cinderella.": "A kind girl goes to the ball by magic, loses a shoe, and is found by the prince.",
    "Translate 'good night' into French.": "'Good night' in French is 'bonne nuit'.",
    "Give me a synonym for happy.": "A synonym for happy is cheerful.",
}


def everyday_texts(count: int) -> list[Text]:
    """Up to `count` questions of daily life, each in as many wordings as it has, chosen by hash."""
    capitals = {country: f"The capital of {country} is {city}." for country, city in CAPITALS.items()}
    pairs = list(ASKED.items())
    for wordings, answers in ((WHAT_IS, THINGS), (CAPITAL, capitals)):
        pairs += [(wording.format(thing=thing), said) for thing, said in answers.items() for wording in wordings]
    texts = [made_text("everyday", question, answer) for question, answer in pairs]
    return sorted(texts, key=lambda text: fraction_of(text.prompt_id, "sample"))[:count]
