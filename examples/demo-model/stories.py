# ruff: noqa: E501 (phrasings are text, and text reads best unbroken)
"""Stories, poems and haiku: probabilistic templates that take up the subject a question names.

A story is a chain of sentences, each drawn from several phrasings, about a cast that stays the same to the end: the
hero's name, kind and pronouns are chosen once. That is what makes the output coherent, and what the model has to learn.
"""

import random
import re
from dataclasses import dataclass

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_INDEFINITE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!(?:uni|use|eu|one))")


def expand(rng: random.Random, text: str, **slots: str) -> str:
    """Draw one phrasing of a template: innermost alternatives first, then the slots, then a/an."""
    while (match := _ALTERNATIVES.search(text)) is not None:
        text = text[: match.start()] + rng.choice(match.group(1).split("|")) + text[match.end() :]
    for key, value in slots.items():
        text = text.replace("{" + key + "}", value)
    return _INDEFINITE.sub(r"\1n ", text)


def capital(text: str) -> str:
    """Upper-case the first letter and leave the rest alone (``str.capitalize`` would lower it)."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """Put the right indefinite article before a noun."""
    return ("an " if noun[:1].lower() in "aeiou" and not noun.startswith(("uni", "eu", "one")) else "a ") + noun


# fmt: off
GIRLS = ("Mira", "Lily", "Anna", "Clara", "Nora", "Ida", "Ruth", "Ella", "Maya", "Rosa", "Tilda", "Juno", "Alma", "Hazel", "Wren", "Emma", "Sofia", "Vera", "Iris", "Greta")
BOYS = ("Tom", "Ben", "Felix", "Oskar", "Leo", "Jonas", "Max", "Emil", "Hugo", "Noah", "Finn", "Theo", "Arlo", "Peter", "Sam", "David", "Paul", "Anton", "Jack", "Milo")
PET_NAMES = ("Ember", "Pip", "Bramble", "Cinder", "Moss", "Pepper", "Rusty", "Clover", "Acorn", "Thistle", "Biscuit", "Nutmeg", "Copper", "Willow", "Dusty", "Poppy", "Flint", "Maple", "Sorrel", "Button")

BEINGS = (
    "fox", "dragon", "bear", "wolf", "rabbit", "owl", "mouse", "cat", "dog", "horse", "lion", "tiger", "frog", "hedgehog", "squirrel", "raven", "robot", "knight", "princess", "prince", "king", "queen", "wizard", "witch",
    "giant", "sailor", "farmer", "baker", "pirate", "unicorn", "turtle", "elephant", "whale", "penguin", "duck", "goose", "bee", "snail", "badger", "otter", "deer", "monkey", "donkey", "goat", "sheep", "crow", "sparrow",
    "ghost", "fairy", "mermaid", "troll", "fisherman", "painter", "teacher", "gardener", "shepherd", "miller", "astronaut", "kitten", "puppy", "little boy", "little girl", "boy", "girl", "old man", "old woman", "bird",
    "spider", "butterfly", "dolphin", "shark", "crocodile", "dinosaur", "beaver", "pig", "cow", "parrot", "swan", "elf", "monster", "snowman", "child", "traveller", "scientist", "programmer", "computer", "hamster", "lamb",
)
THINGS = (
    "lantern", "key", "map", "bell", "book", "candle", "mirror", "kite", "stone", "feather", "clock", "ring", "box", "violin", "shell", "letter", "coin", "compass", "flute", "hat", "blanket", "teapot", "acorn", "crown",
    "sword", "balloon", "drum", "telescope", "spoon", "umbrella", "pumpkin", "rose", "apple", "cup", "lamp", "snowflake", "star", "lighthouse", "castle", "tree", "river", "mountain", "forest", "bridge", "garden", "train",
    "ship", "island", "cave", "tower", "mill", "boat", "door", "window", "fire", "cloud", "magic box", "golden key", "silver bell", "red balloon", "old clock", "magic lamp", "treasure", "server", "bicycle", "guitar", "shoe",
)
THEMES = (
    "friendship", "love", "courage", "the sea", "winter", "summer", "autumn", "spring", "the moon", "the stars", "music", "kindness", "hope", "rain", "snow", "fire", "the forest", "dreams", "time", "magic", "honesty",
    "patience", "dragons", "foxes", "robots", "cats", "dogs", "pirates", "knights", "space", "the night", "the wind", "home", "a long journey", "two friends", "the sun", "school", "computers", "Hearth", "Christmas",
    "two brothers", "three bears", "a family", "the future", "trees", "birds", "horses", "a new beginning", "a lost city", "an old house", "adventure", "tea", "bread", "chocolate", "numbers", "sleep", "ghosts", "the desert",
)

TRAITS = ("little", "young", "curious", "brave", "shy", "gentle", "clever", "small", "lonely", "cheerful", "quiet", "kind", "patient", "old", "restless")
PLACES = (
    "in a small village by the sea", "in a quiet valley", "in the middle of a great forest", "in a town with crooked roofs", "in a hut at the edge of the woods", "in a land of green hills", "in a cold country in the north",
    "in a house near the river", "in a harbour full of ships", "in the high mountains", "in a garden behind an old wall", "in a castle on a hill", "on a small island", "under an old bridge", "at the end of a long road",
)
# Places that a question may ask for.
ASKED_PLACES = (
    "in space", "on the moon", "in Paris", "in the desert", "at the bottom of the sea", "in a big city", "in the jungle", "in the forest", "on a mountain", "in a cave", "in London", "at school", "in winter", "on Mars",
    "in the snow", "in a castle", "on a ship", "on an island", "in a library", "under the sea", "in the future", "in the rain", "on a farm", "in a small town", "in the clouds", "in the zoo", "on a train", "in Africa",
)
ADJECTIVES = (
    "red", "blue", "green", "purple", "golden", "black", "white", "tiny", "big", "giant", "sleepy", "angry", "hungry", "magical", "wise", "friendly", "sad", "happy", "funny", "lazy", "proud", "silver", "wild", "strange",
    "poor", "rich", "blind", "lost", "flying", "talking", "invisible", "beautiful", "ugly", "grumpy", "silly", "fast", "slow", "cold", "fiery",
)
# fmt: on


@dataclass(frozen=True)
class Cast:
    """The hero of one story and the words that refer to the hero, fixed for the whole of it."""

    name: str
    kind: str
    he: str
    him: str
    his: str

    def slots(self) -> dict[str, str]:
        """The template slots of this cast, with the capitalised forms that begin sentences."""
        plain = {"name": self.name, "kind": self.kind, "he": self.he, "him": self.him, "his": self.his}
        return plain | {"He": capital(self.he), "His": capital(self.his)}


_FEMALE = {"princess", "queen", "witch", "mermaid", "fairy", "little girl", "girl", "old woman", "woman"}
_MALE = {"prince", "king", "wizard", "knight", "fisherman", "little boy", "boy", "old man", "snowman", "man"}
_PEOPLE = {
    "sailor", "farmer", "baker", "pirate", "painter", "teacher", "gardener", "shepherd", "miller", "astronaut",
    "child", "traveller", "scientist", "programmer",
}  # fmt: skip


def make_cast(rng: random.Random, kind: str, name: str | None = None) -> Cast:
    """Choose a name and pronouns that fit a kind of hero."""
    if kind in _FEMALE or (kind not in _MALE and rng.random() < 0.5):
        pronouns, names = ("she", "her", "her"), GIRLS
    else:
        pronouns, names = ("he", "him", "his"), BOYS
    if name is not None:
        pronouns = ("she", "her", "her") if name in GIRLS else ("he", "him", "his") if name in BOYS else pronouns
    elif kind not in _FEMALE | _MALE | _PEOPLE:
        names = PET_NAMES
    return Cast(name or rng.choice(names), kind, *pronouns)


_OPENING = (
    "[Once upon a time,|Long ago,|Many years ago,|A long time ago,] {place}, there lived a {trait} {kind} [named|called] {name}.",
    "{Place} there lived a {trait} {kind} [whose name was|by the name of] {name}.",
    "There was once a {trait} {kind} named {name}, who lived {place}.",
    "Once there was a {trait} {kind} called {name}. {He} lived {place}.",
)
_HABIT = (
    "[Every evening|Each night], {name} [sat by the fire and watched the embers glow|looked up at the stars and made a wish|listened to the wind in the trees].",
    "{name} [had everything that {he} needed|was happy most of the time], but {he} often [wondered what lay beyond the hills|wished for a friend|dreamed of far away places].",
    "{name} loved [warm bread and old songs|the smell of rain|the first light of the morning|long walks and good stories].",
    "Everybody knew {name}, because {he} [always had a kind word|could whistle like a bird|never forgot a promise].",
)
_LOST = (
    "One [cold|dark|windy|stormy] [evening|night], {name} heard a [soft|small|sad] voice [outside the door|behind a tree|near the old well]. [It was|There sat] a {friend} who had lost the way home.",
    '"[Please help me,|Can you help me?]" said the {friend}. "[The night is dark, and I am afraid|I have walked all day, and I cannot find my family|The snow has covered the path]."',
    '{name} did not think twice. "[Come with me|Do not be afraid]," {he} said. "[Two can find a path more easily than one|We will look for the way together|I know these woods well]."',
    "{He} took [a small lantern|a warm scarf|a piece of bread], and they [walked|went] [through the dark|over the hills|along the river] [side by side|hand in hand|until their feet were sore].",
    "[Whenever they grew tired|When the wind blew hard], {name} [told a story|sang a song|made a little fire], and the way [seemed shorter|felt less cold].",
    "[At last|Just before dawn|When the sun came up], they saw [a light in a window|smoke above a roof|a house between the trees]. The {friend} [laughed and began to run|cried with joy].",
    "From that day on, {name} and the {friend} were [the best of friends|friends], and {he} was never [lonely|afraid of the dark] again.",
)
_FOUND = (
    "One [morning|day|afternoon], {name} found a {thing} [under an old tree|on the beach|in the attic|beside the road]. It was [dusty and very old|small but beautiful|unlike anything {he} had ever seen].",
    '"[Whose is this|To whom does this belong]?" {name} asked. {He} asked [the baker|the miller|the old woman next door], but nobody knew.',
    "That night, the {thing} [began to glow|hummed a quiet tune|shone like a little star]. {name} [could hardly believe it|held {his} breath|rubbed {his} eyes].",
    '[A voice whispered|It seemed to say]: "[Carry me to the top of the hill|Take me where I am needed|Follow the light], and you will see what you have been looking for."',
    "So {name} [set out|packed some bread and set out|put on {his} coat and left] [before the sun rose|at once]. The way was [long and steep|dark and full of stones], but {he} [did not turn back|kept going].",
    "On the top of the hill {he} found [a traveller who was lost|a child who was crying|an old man who was cold], and {he} gave away the {thing} [without a second thought|with a smile].",
    'The stranger [smiled|thanked {him}] and said: "[You have a warm heart|Now I can find my way home|The best things are those we share]." And {name} [walked home feeling richer than a king|knew that it was true].',
)
_FEAR = (
    "[But {name} had a secret: {he} was afraid of the dark.|There was only one thing that {name} feared: the dark.|But as soon as night fell, {name} was afraid.]",
    "[All the others laughed|Nobody knew about it|{He} never told anybody], and so {name} [stayed at home when the others went out to play|often sat alone].",
    "One [night|evening], [a storm put out every fire in the land|the river rose and cut off the bridge|snow covered all the roads]. Somebody had to [carry a light to the old tower|bring help|fetch the last ember from the mountain].",
    'Everybody looked at the ground. "I will go," said {name} [in a small voice|quietly], and {he} was [more surprised than anybody|shaking a little].',
    "Step by step {he} went [through the dark|against the wind]. {His} heart [beat like a drum|was loud], but {he} thought of {his} friends and [went on|did not stop].",
    "[When|As soon as] {he} reached [the tower|the end of the road], {he} saw that the dark was [only the place where the stars live|not as big as {he} had thought].",
    "{name} [lit the fire|held up the light], and [all the windows in the valley began to shine|everybody cheered]. Brave, {he} learned, does not mean without fear. It means [to go on anyway|that you go in spite of it].",
)
_WISH = (
    "{name} [wished for only one thing|had one great wish]: to [see the sea|build a boat that could fly|learn the song of the stars|find the place where the sun sleeps].",
    'The others said: "[That cannot be done|You are too small for that|Nobody has ever done it]." But {name} [only smiled|did not listen|had already begun].',
    "[Every day|Each morning] {he} [worked a little|took one small step|learned one new thing]. [Some days went well, and others did not.|It took a whole year.|Sometimes it rained, and sometimes {he} wanted to give up.]",
    'Then an old {friend} came by and [watched {him} for a while|sat down beside {him}]. "[Why do you try so hard|Are you not tired]?" asked the {friend}.',
    '"Because [I want to know|the wish keeps me warm|every step brings me closer]," said {name}. The {friend} [nodded|laughed] and [stayed to help|showed {him} a secret path].',
    "[Together they worked|Side by side they went on] until [the first snow fell|the leaves turned red|spring came back]. And one [bright|clear] morning, the wish came true.",
    '{name} [laughed until the tears came|was silent with joy]. "[It was a long way|I did it]," {he} said, "[and the best part was that you came with me|but not alone]."',
)
_WINTER = (
    "That year the winter was [longer and colder than ever|very hard]. The [rivers froze|snow reached the roofs], and [the food grew scarce|the wood was almost gone].",
    "[One by one|House by house], the fires went out. Only {name} had kept [a few embers|one small ember] [under the ash|in an iron pot], because {he} [was careful|knew how to wait].",
    '"[If I keep it, I will be warm|This is all I have]," thought {name}. "But [what is a warm house worth when the others freeze?|a fire grows when it is shared.]"',
    "So {he} [went from door to door|walked through the snow], and at each hearth {he} left [a glowing ember|a little of the fire].",
    "Soon [smoke rose from every roof|every window was bright again], and the {friend} from the next house brought [soup|bread and honey|a pot of tea] for everybody.",
    "They [sang|told stories] until [late in the night|the morning came], and nobody was cold any more.",
    'When spring came, they [thanked {name}|called {name} the keeper of the fire]. {He} only said: "[It was one small ember. You made it a fire|A fire that you share does not get smaller]."',
)
_CONTEST = (
    "One day, [the king|the mayor|an old wizard] announced a contest: whoever [brought the most beautiful thing|made the queen smile|brought the best gift] would win [a golden crown|a sack of gold|a white horse].",
    "[Everybody came|They came from near and far]. One brought [a ruby as big as an egg|a bird that could speak|a carpet from the east], another [a clock that never stopped|a cake with seven floors].",
    "{name} [had nothing of the kind|was poor]. {He} brought only [a {thing}|a small {thing}], and the crowd [laughed|whispered].",
    '"[Why did you bring this|What is so special about it]?" asked [the judge|the queen]. "[My grandmother gave it to me|I share it with my friends]," said {name}, "[and each time I look at it, I remember that I am loved|and it has made many of them happy]."',
    "[The hall grew silent|Nobody laughed any more]. [Then the queen smiled for the first time in years.|An old {friend} wiped away a tear.]",
    "And so {name} won [the contest|the prize]. {He} [gave half of it to the poor|shared it with everybody who had come], and [went home singing|kept only the {thing}].",
)
_HILL = (
    "One [evening|night], a strange [noise|song|rumble] came from [the old mill|the hill|a cave nearby]. [The windows shook|The cups danced on the table], and nobody dared to [sleep|go outside].",
    '"It must be a [monster|giant|ghost]!" [cried the baker|said the neighbours]. [They locked their doors|They hid under their beds] and [waited for the morning|blew out the candles].',
    '{name} [listened for a while|stood at the window]. "[It does not sound angry|To me it sounds sad]," {he} said. "[Somebody should go and ask|I will go and see]."',
    "{He} took [a candle and a piece of cake|{his} warmest coat and a piece of cake] and [climbed up in the dark|walked toward the sound]. [With every step the noise grew louder.|The path was steep, and the wind blew out the light.]",
    "And there sat a {friend}, all alone, [sneezing|crying|singing a sad song] so loudly that [the stones jumped|the whole hill trembled].",
    '"[Why are you here|What is the matter]?" asked {name}. "[I have no one to talk to|I wanted to say hello, but everybody ran away]," said the {friend}.',
    "{name} [shared the cake|sat down and shared the cake], and [in the morning they walked down together|before long they were friends]. [Everybody was ashamed, and then there was a great feast.|Since that night nobody there has been afraid of a noise.]",
)
_SONG = (
    "One [autumn|spring], all the songs [disappeared|were gone]. [Nobody knew why|It happened overnight]: [the birds were silent|the fiddles made no sound], and people [spoke in whispers|forgot how to dance].",
    "{name} [missed the songs more than anybody|could not bear the silence]. So {he} went to [the oldest tree in the forest|the wise {friend} by the lake] and asked what to do.",
    '"[Somewhere a song is left|One song is never lost]," was the answer. "[It is hidden where nobody listens|You will hear it when you are very still]."',
    "For [three days|seven nights], {name} [walked|wandered] [through rain and wind|over hills and fields] and listened. {He} heard [the brook|the rain], [the grass|the wind], and [{his} own steps|a far away bell].",
    "[At last|On the last evening], {he} sat down [by a small fire|under the stars] and [closed {his} eyes|was quite still]. And there it was: [{his} own heart, beating softly, one, two, three|a small tune, as old as the hills|the first note, then another, and then all of them].",
    "{name} began to hum along, and [a {friend} joined in|soon a {friend} hummed with {him}]. The tune [flew from house to house|grew with every voice], until [the whole land was singing|the birds remembered it].",
    "[And whoever is quiet enough can hear it still.|Since then, nobody there has been silent for long.]",
)
_BRIDGE = (
    "[Two neighbours|The people on both sides of the river] had [quarrelled|not spoken] for years. [Nobody remembered why|It had begun with a goat, or perhaps with a hat].",
    "{name} [was sad about it|did not like it], because {he} had [a friend on the other side|heard them laugh long ago]. So one [morning|day] {he} began to build a bridge.",
    '{He} carried [stone after stone|one plank after another]. "[What a foolish {kind}|That will never hold]!" [said the people|they called from both sides].',
    "But [on the third day|soon] a {friend} came and [brought a hammer|held the rope]. [The next day there were four of them|Then a child came, and then another].",
    "When the bridge was almost finished, [there was only one plank missing|the last stone was too heavy for {name}]. [For a long moment nobody moved.|It was very quiet.]",
    "Then [two old neighbours|somebody from each side] [stepped forward|took hold of it], and [together they put it in its place|they looked at each other and began to smile].",
    "That evening they [ate|danced] in the middle of the bridge, and {name} [sat between them with a cup of tea|fell asleep with a smile].",
)
_STORM = (
    "One [day|morning], {name} [sailed out in a small boat|took the little boat to catch some fish]. The [sea|water] was [as smooth as glass|calm], and the [sky was blue|sun was warm].",
    "But [in the afternoon|before long] [black clouds|a great storm] came up, and the waves [grew as high as houses|threw the boat up and down]. The shore [was gone|could not be seen].",
    '{name} [held on with both hands|was wet and cold]. "[I must not give up|Somewhere there must be land]," {he} [thought|said]. "[Every storm comes to an end|I will row a little more]."',
    'Then {he} saw [a light|a tiny light] [far away|between the waves]. It [blinked three times|went out and came back], as if it wanted to say: "[Come here|This way]!"',
    "{name} rowed [until {his} arms hurt|with all {his} strength] toward the light. On the shore stood a {friend} with a [lantern|torch], [who had waited there all night|wet to the skin].",
    '"[How did you know that I was out there|Why did you wait for me]?" asked {name}. "[I did not know|I hoped]," said the {friend}. "[But a light is never lit in vain|Somebody is always out there]."',
    "[Since then, {name} lights a lantern in every storm.|From that night on, the two of them kept the light together.]",
)
_SOUP = (
    'One day {name} wanted to cook [a soup|a stew], but there was only [one onion|half a carrot|a single potato] in the house. "[That is not much|Well, it is a beginning]!" said {name}.',
    "{He} put [it|it carefully] into the biggest pot and [stirred|sang] [very loudly|with great care]. [The smell of the onion|The noise] brought a {friend} to the door.",
    '"[What a lot of soup for one!|What are you cooking?]" said the {friend}. "[The best soup in the world|A secret]," said {name}, "but [it needs a little salt|something is missing]."',
    "The {friend} [ran home and came back with|happened to have] [salt|some beans], and [a minute later|then] a goose [brought|came with] [butter|bread], and [a very old bear|three mice] came with [honey|cheese].",
    "In the end, the pot [was so full that it walked off the stove|boiled over and chased the goose around the table]. [Everybody laughed so much that the spoons fell down.|The {friend} fell into the butter.]",
    'The soup tasted [terrible|a little like shoes], but [they ate all of it|nobody minded]. "[Tomorrow|Next time]," said {name}, "[we will make a cake|I will buy two onions]."',
)
_HAT = (
    "{name} had a [hat|scarf] of which {he} was very proud. [It was green with a yellow feather|It was red and much too large]. {He} wore it [in the bath and in bed|day and night].",
    'One [windy|stormy] [day|morning], the wind [took it away|stole it]. "[Stop, thief|Come back]!" cried {name} and ran after it, [through the market|over the fence] and [into a fountain|through a wedding].',
    "[The wind put it on a cow, and the cow looked very fine.|It landed on the head of the mayor, who did not notice.] Then it flew on, [over the roofs|across the river], and {name} [ran behind it|jumped after it].",
    '[At last|After an hour], it came down in a tree, where a {friend} [was building a nest|was having lunch]. "[What a lovely bed|How kind of you to bring me a house]!" said the {friend} and [climbed in|sat down in it].',
    '{name} [thought about it|scratched {his} head]. "[It did not keep my ears warm anyway|It suits you better]," {he} said. "[But may I visit it on Sundays?|Please brush it once a week.]"',
    "So {he} visited it every Sunday. And the wind? [It has found a scarf.|It is still laughing about it.|It has stolen the hat of the mayor.]",
)
_PLOTS = (_LOST, _FOUND, _FEAR, _WISH, _WINTER, _CONTEST, _HILL, _SONG, _BRIDGE, _STORM)
_FUNNY = (_SOUP, _HAT, _HILL)
_SHORT = (
    (
        "One [cold|dark] night, {he} found a {friend} who [was lost|had no home|was afraid of the storm].",
        '{name} [made a fire and shared {his} bread|opened the door and said: "Come in!"], and [they became friends|the two were never lonely again].',
    ),
    (
        "One day, {he} [climbed the highest hill|walked all the way to the sea] to see [where the sun sleeps|the end of the world].",
        "{He} found [only the evening wind and a {friend} who was watching the sky|a {friend} who had come for the same reason]. They [laughed|sat down together], and [that was better than what they had looked for|the stars came out one by one].",
    ),
)
_SHORT_THING = (
    (
        "One [morning|day], {he} found a {thing} [by the road|under a tree|on the beach].",
        "{name} [took it home and cared for it|showed it to everybody], and [one dark night its light brought a lost traveller home|it brought {him} luck for many years|whoever saw it had to smile].",
    ),
)
# What a question may say about its hero, the sentence that takes it up, and a plot that goes with it.
CLAUSES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("who [is|was] afraid of the dark", "{name} was afraid of the dark.", _FEAR[1:]),
    (
        "who [could not|cannot] sleep",
        "{name} could not sleep, [however hard {he} tried|and so {he} looked at the stars every night].",
        _FOUND,
    ),
    ("who [wants|wanted] to see the sea", "{name} wanted to see the sea more than anything else.", _WISH[1:]),
    ("who [learns|learned|wants|wanted] to fly", "{name} wanted to fly more than anything else.", _WISH[1:]),
    ("who [is|was] lonely", "{name} was lonely, and {he} wished for a friend.", _LOST),
    (
        "who [lost|has lost] [his|her|its|a] [way|friend|hat|shoe]",
        "{name} had lost something dear, and that made {him} sad.",
        _FOUND,
    ),
    ("who [finds|found] a friend", "{name} had no friends, and the evenings were long.", _LOST),
    ("who [loves|loved] [to sing|music]", "{name} loved to sing, and the whole valley liked to listen.", _CONTEST),
    (
        "who [saves|saved] [the village|the world|the day]",
        "{name} was small, and nobody expected much of {him}.",
        _WINTER,
    ),
    (
        "who [lost|has lost|had lost] [his|her|its|the] fire",
        "{name} had lost {his} fire, and every night was cold.",
        _LOST,
    ),
    ("who [is|was] lost at sea", "{name} loved the sea.", _STORM),
    ("who [makes|made|builds|built] a new friend", "{name} had no friends, and the evenings were long.", _HILL),
    ("who [loves|loved] to cook", "{name} loved to cook, but {he} was not very good at it.", _SOUP),
    ("who [is|was] always cold", "{name} was always cold, even in the summer.", _WINTER),
    ("who [wants|wanted] to be brave", "{name} wanted to be brave, but it was not easy.", _FEAR),
    (
        "who [goes|went] on [an adventure|a journey]",
        "{name} [had packed {his} bag many times|dreamed of a great adventure].",
        _FOUND,
    ),
    ("who [likes|liked|loves|loved] tea", "{name} loved tea and drank a cup of it every evening.", _LOST),
)
_MORALS = (
    "[And they lived happily ever after.|The end.|And if they have not moved away, they still live there today.|And when the nights are long, people still tell this story.|And that is the end of the story.]",
    "",
)
_FRIENDS = ("fox", "bear", "owl", "rabbit", "mouse", "wolf", "hedgehog", "raven", "deer", "bird", "turtle", "goat", "squirrel", "badger")  # fmt: skip


def _by_kind(rng: random.Random, sentence: str) -> str:
    """Call the hero by kind now and then, so that the subject of the question stays in sight."""
    text, *pieces = sentence.split("{name}")
    for piece in pieces:
        begins = text == "" or text.endswith((". ", "? ", "! "))
        text += ("{name}" if rng.random() < 0.65 else "{The}" if begins else "{the}") + piece
    return text


def story(
    rng: random.Random,
    cast: Cast,
    *,
    friend: str | None = None,
    thing: str | None = None,
    trait: str | None = None,
    place: str | None = None,
    clause: int | None = None,
    funny: bool = False,
    length: str = "normal",
) -> str:
    """Tell a story about a cast; whatever else the question named picks a plot and sentences in which it matters."""
    place = place or rng.choice(PLACES)
    plots = (
        [_FOUND, _FOUND, _FOUND, _CONTEST]
        if thing in THINGS[:34]
        else [_FOUND]
        if thing
        else [_LOST, _LOST, _WISH, _WINTER, _HILL, _STORM, _BRIDGE]
        if friend
        else list(_FUNNY if funny else _PLOTS)
    )
    slots = cast.slots() | {
        "friend": friend or rng.choice([kind for kind in _FRIENDS if kind != cast.kind]),
        "thing": thing or rng.choice(THINGS[:16]),
        "trait": trait or rng.choice(TRAITS if " " not in cast.kind else ("curious", "gentle", "cheerful", "kind")),
        "place": place,
        "Place": capital(place),
        "the": f"the {cast.kind}",
        "The": f"The {cast.kind}",
    }
    if clause is not None:
        plots = [CLAUSES[clause][2]]
    plot = rng.choice(plots)
    opening = rng.choice(_OPENING)
    if length == "short":
        return expand(rng, " ".join([opening, *rng.choice(_SHORT_THING if thing else _SHORT)]), **slots)
    parts = [opening, rng.choice(_HABIT) if clause is None else CLAUSES[clause][1]]
    parts += [_by_kind(rng, sentence) for sentence in plot]
    if length == "long":
        others = [other for other in _PLOTS if other is not plot and other is not _CONTEST and other is not _FEAR]
        links = (
            "[But that is not the end of the story.|But the story goes on.] ",
            "[A year later|Some time later|When autumn came], something else happened. ",
        )
        for link, other in zip(links, rng.sample(others, 2), strict=True):
            parts += ["\n\n" + link + other[0], *(_by_kind(rng, sentence) for sentence in other[1:])]
    parts.append(rng.choice(_MORALS))
    return re.sub(r" +(\n|$)", r"\1", expand(rng, " ".join(parts), **slots)).replace("\n ", "\n")


_THEME_STORY = (
    "[Once upon a time,|Long ago,] {place}, there lived [an old storyteller|an old woman|a wise old man] named {name}. [Nobody knew more about {theme} than {name}.|{name} was famous for one thing: {he} knew everything about {theme}.]",
    'One [evening|winter night|rainy day], [the children|a curious child|a young traveller] came and asked: "[Tell us|Please tell us] about {theme}!"',
    '{name} [smiled and put another log on the fire|poured some tea and thought for a while]. "[When I was young|Many years ago]," {he} said, "I [walked over the mountains|sailed across the sea|left home] to learn about {theme}."',
    '"[The wind was cold and the road was long|I was often tired, and sometimes I was lost], but [everywhere I met people who shared their bread with me|each night I found a warm fire and a friendly face]."',
    '"And what did you learn?" they asked. {name} looked into the embers. "[That nobody can understand {theme} alone|That {theme} is best when you share it|That you find {theme} where you least expect it]."',
    "[It was silent for a moment.|Outside, the snow was falling softly.] Then [everybody began to speak at once|the smallest child began to laugh], and they talked about {theme} until [the fire had burned low|the moon stood high above the roofs].",
    "And [when they went home|on the way home], [the night seemed a little warmer than before|each of them carried a little light in the heart].",
)


def theme_story(rng: random.Random, theme: str) -> str:
    """Tell a story about a subject that cannot be a hero: anything at all, which is why unknown subjects come here."""
    cast = make_cast(rng, rng.choice(("old man", "old woman")))
    text = " ".join([*_THEME_STORY, rng.choice(_MORALS)]).strip()
    return expand(rng, text, **cast.slots(), theme=theme, place=rng.choice(PLACES))


_SEQUEL = (
    "The next [morning|day], {name} [woke up early|looked out of the window] and saw that [the snow had melted|a strange ship had come|somebody had left a letter at the door].",
    '[{He} ran outside to see more.|"What can that be?" {he} wondered.] [An old friend was waiting there|It was a message from far away], and [it was the start of a new adventure|there was much to tell].',
    "They [shared some warm bread|made a fire] and [talked until the evening|made plans for the summer]. [{name} had never been so happy.|And {name} knew that the best was yet to come.]",
)


def sequel(rng: random.Random, cast: Cast) -> str:
    """Say what happened next to a hero who is already known from an earlier turn."""
    return expand(rng, " ".join(_SEQUEL), **cast.slots())


# fmt: off
_HAIKU: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "fire": (("Embers softly glow", "Flames dance in the dark", "A spark wakes the night", "Warm fire in the hearth"), ("the winter night draws closer", "shadows leap along the wall", "the old log whispers and cracks", "red light on our tired faces"), ("warm hands share the light", "the cold stays outside", "ash keeps its secret", "we wait for the dawn")),
    "embers": (("Embers softly glow", "Under the grey ash", "The last light remains"), ("the fire sleeps but does not die", "a little red heart still beats", "one breath will wake it again"), ("morning brings new flames", "warm until the dawn", "it waits for the wind")),
    "snow": (("Snow falls without sound", "White fields in the dawn", "The first flakes of snow"), ("the world pulls up its blanket", "every roof has a white hat", "footprints lead from door to door"), ("the pine trees bow down", "even time stands still", "a crow shakes its wings")),
    "rain": (("Rain taps on the roof", "Grey clouds hanging low", "Soft rain in the night"), ("the garden drinks and is glad", "each puddle holds a small sky", "the river hums a new song"), ("I stay in and read", "a frog starts to sing", "the leaves shine like glass")),
    "the sea": (("Waves roll to the shore", "The wide sea at dusk", "Salt wind on my face"), ("gulls are calling from the rocks", "a small boat comes home at last", "the tide writes upon the sand"), ("then wipes it away", "the moon pulls it back", "the deep keeps its songs")),
    "the moon": (("Moon above the pines", "A pale silver coin", "The moon climbs the hill"), ("its light lies upon the lake", "the fields are silver and still", "an owl calls and none replies"), ("the night holds its breath", "I walk home slowly", "all the roofs are white")),
    "autumn": (("Red leaves on the path", "Autumn wind at dusk", "The last apple falls"), ("the geese are leaving again", "smoke rises from the chimneys", "the days grow short and golden"), ("we bring in the wood", "the year shuts its book", "a cold moon looks on")),
    "spring": (("Snow melts on the hill", "The first green leaves come", "Spring rain on the fields"), ("a bird tries out its new song", "bees are humming in the trees", "the brook is in a hurry"), ("windows open wide", "the world starts again", "a child laughs outside")),
    "summer": (("Summer afternoon", "The sun stands still now", "Bees in the clover"), ("a cat sleeps on the warm stones", "the long day is made of gold", "we swim where the river bends"), ("nobody works now", "the shade moves with us", "the night is still far")),
    "winter": (("Winter at the door", "Ice upon the lake", "Long nights, little light"), ("the kettle sings on the stove", "our breath hangs white in the air", "the trees stand bare and patient"), ("the hearth keeps us warm", "spring sleeps in the seeds", "we tell old stories")),
    "a cat": (("The cat on the sill", "Soft paws on the floor", "Two green eyes at night"), ("watches the birds go by", "sleeps the whole morning away", "hunts a shadow on the wall"), ("and dreams it can fly", "then asks for more milk", "and purrs by the fire")),
    "a dog": (("The dog at the door", "A tail that wags fast", "Muddy paws again"), ("has waited for me all day", "runs along the empty beach", "brings me back the same old stick"), ("the whole world is good", "joy does not need words", "and we both go home")),
    "the night": (("Night falls on the town", "The stars come out now", "Dark fields, far away"), ("one window is still alight", "the wind walks through empty streets", "an owl flies without a sound"), ("somebody can't sleep", "the dreams are waiting", "the dawn is not far")),
    "love": (("Two cups on the table", "Your hand in my hand", "A light in the house"), ("we do not need many words", "the long road home seems so short", "outside it has begun to snow"), ("the fire does the rest", "the winter is warm", "you have kept it lit")),
    "mountains": (("Mountains in the mist", "Old stone, older snow", "The path climbs and climbs"), ("an eagle circles above", "the valley lies far below", "a bell rings from far away"), ("the sky comes closer", "the wind knows the way", "silence has a home")),
    "the forest": (("Moss upon the stones", "Light between the trees", "Deep in the old wood"), ("a deer stands still and listens", "the path is covered with leaves", "the brook speaks to the old roots"), ("nobody answers", "and is gone again", "the shadows are green")),
    "a river": (("The river runs on", "Clear water, round stones", "Under the old bridge"), ("it never says the same thing", "a leaf travels to the sea", "a heron stands on one leg"), ("and never looks back", "the fish do not know", "time flows with it, too")),
    "a computer": (("The screen glows at night", "Small lights, humming fans", "Numbers in the dark"), ("a cursor waits for a word", "it counts and it does not tire", "the model wakes from its sleep"), ("then it starts to write", "the coffee is cold", "morning finds me here")),
    "Hearth": (("Embers in the rack", "The model sleeps now", "A request comes in"), ("somebody asks and it wakes", "the weights are warm and close by", "bytes fly from the disk like sparks"), ("the first words appear", "the fire burns again", "no one waits for long")),
    "tea": (("Steam above the cup", "Tea on a cold day", "The kettle whistles"), ("the leaves sink slowly and rest", "both my hands are warm again", "outside the rain keeps falling"), ("there is time enough", "I drink the quiet", "a friend comes to stay")),
    "stars": (("Stars above the field", "So many small lights", "Clear and frosty night"), ("their light is older than we", "each one a fire far away", "I count until I forget"), ("and still they shine on", "the dark is not dark", "my breath rises, too")),
    "a fox": (("A fox in the snow", "Red tail in the grass", "Quick steps in the dusk"), ("stops and looks back once at me", "crosses the field like a flame", "he knows the way past the fence"), ("then the night takes him", "and the hens are still", "only tracks remain")),
    "a bird": (("A bird on the branch", "Wings above the field", "Early in the day"), ("it sings before the sun comes", "it carries straw to its nest", "it does not know that I hear"), ("and then it is gone", "the whole tree listens", "the sky opens up")),
    "coffee": (("Coffee in the cup", "The smell of the beans", "Half awake, half dreams"), ("the morning begins slowly", "the kitchen is warm and bright", "the newspaper lies unread"), ("now the day can start", "one more sip of peace", "the dreams fade away")),
    "a dragon": (("The dragon wakes up", "Smoke over the hill", "Scales of gold and green"), ("the mountain trembles softly", "he counts his treasure again", "he warms the whole cave at night"), ("and then falls asleep", "only mice keep watch", "the snow melts around")),
    "time": (("The clock on the wall", "Sand runs through the glass", "Yesterday is gone"), ("it does not care where we go", "tomorrow has not yet come", "each grain is a little day"), ("now is all we have", "the tea is still warm", "the old hands go round")),
    "flowers": (("Flowers by the road", "One rose in the rain", "The garden wakes up"), ("nobody planted them there", "a bee visits every one", "the petals open slowly"), ("they bloom anyway", "the morning smells sweet", "summer has begun")),
}
_HAIKU_ANY = (
    ("I think of {topic}", "A thought of {topic}", "Today, {topic}"),
    ("the wind turns another page", "far away a bell rings once", "the evening light grows softer", "small things become clear and bright"),
    ("and the world is still", "the quiet stays here", "my heart is at rest", "warm as an ember"),
)

_COUPLETS = (
    ("The fire is low, the night is long,", "the wind outside hums an old song."), ("The stars look down on field and hill,", "the owl is up, the world is still."), ("A little light, a little spark,", "is stronger than the deepest dark."),
    ("The snow lies soft on roof and tree,", "and you are here to sit with me."), ("The river runs, the clouds go by,", "a lonely bird sings in the sky."), ("So take my hand and come along,", "the road is short, our steps are strong."),
    ("The morning comes, the dew is bright,", "the hills are full of golden light."), ("And when the day is said and done,", "we watch the slowly setting sun."), ("The embers glow, they do not sleep,", "they have a promise they must keep."),
    ("The garden dreams beneath the rain,", "and soon the flowers bloom again."), ("The moon has climbed above the wall", "and spreads its silver over all."), ("There is a warmth that never ends:", "a quiet fire, a few good friends."),
    ("The sea is deep, the sky is wide,", "the little boat rides with the tide."), ("The world is big, and I am small,", "but still I sing for one and all."), ("Let others run, let others race,", "I like to walk at my own pace."),
)
_OPENERS = (
    ("I sing of {topic}, near and far,", "as bright as any evening star."), ("O {topic}, you are dear to me,", "as dear as sunlight on the sea."), ("I thought of {topic} all the day,", "and all my sorrows went away."),
    ("Come sit with me and let us talk", "of {topic} on our evening walk."), ("They say that {topic} cannot stay,", "and yet I see it every day."),
)
# fmt: on

HAIKU_TOPICS = tuple(_HAIKU)


def haiku(rng: random.Random, topic: str) -> str:
    """Write a haiku; a topic without lines of its own is named in the first line."""
    key = next((known for known in _HAIKU if topic in (known, known.split(" ", 1)[-1], known.rstrip("s"))), None)
    lines = _HAIKU[key] if key else _HAIKU_ANY
    first, second, third = (rng.choice(line) for line in lines)
    return expand(rng, f"{first},\n{second};\n{third}.", topic=topic)


def poem(rng: random.Random, topic: str, short: bool = False) -> str:
    """Write rhyming couplets, the first of which names the topic."""
    couplets = [rng.choice(_OPENERS), *rng.sample(_COUPLETS, 1 if short else rng.choice((2, 3, 3)))]
    return expand(rng, "\n".join(line for couplet in couplets for line in couplet), topic=topic)
