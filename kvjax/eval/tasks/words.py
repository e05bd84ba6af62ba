"""The words that generated tasks are made of: common nouns, adjectives, and two kinds of filler text.

Every noun is one token (with its leading space) in the tokenizer of the model that ships, so that a task can
be dense: that is tested, and is why this list feeds the tokenizer's training.
"""

import random

_NOUNS = """
apple arch arm army arrow atom axe baby badge ball banana band bank barn basin basket bath beach bean bear
beard beast bed bee bell belt bench bird blade blanket boat bone book boot bottle bowl box boy brain
branch brass bread brick bridge broom brush bucket bull bus bush butter button cabin cable cactus cake
camel camera camp canal candle canoe canyon cap car card carpet carrot cart castle cat cave chain chair
chalk cheese cherry chess chest chicken chief child church circle city clay cliff clock cloth cloud clown
coal coast coat coffee coin copper coral corn cotton couch cow crab crane cream creek crow crown cup
curtain dance dawn deer desert desk diamond dice dinner dish doctor dog doll dolphin donkey door dove
dragon dream dress drum duck dust eagle ear earth echo egg elbow engine fan farm feather fence ferry
finger fire fish flag flame flower flute fly fog foot forest fork fox frame frog fruit garden garlic gate
ghost giant girl glass glove goat gold goose grain grape grass guitar hair hammer hand harbor hat hawk
heart hen hill honey hook horn horse hotel house ice ink iron island ivory jacket jar jewel judge juice
jungle kettle king kite kitten knee knife knight ladder lake lamb lamp lawn leaf lemon letter lion lizard
lock lunch magnet map marble market mask meadow medal melon metal milk mill mirror money monkey moon moth
motor mountain mouse mouth mud museum music nail neck needle nest night north nose nurse oak ocean olive
onion orange organ owl oyster paint palace palm panda paper parrot peach pearl pen pencil pepper piano pig
pillow pilot pine pipe pirate planet plate plum pocket poet pond pony potato prince pupil queen rabbit
radio rain raven ribbon rice ring river road robin robot rock roof room rope rose ruby sail salad salt
sand scarf school sea seed shark sheep shell ship shirt shoe silk silver sister skate skin sky smoke snail
snake snow soap sock sofa soup spider spoon spring star steam steel stone storm stove straw sugar sun swan
sword table tail tea teeth temple tent thumb tiger toast toe tomato tooth tower town toy train tree truck
trumpet tulip turtle uncle valley velvet village violin wagon wall water whale wheat wheel whip willow
wind window wine wing winter wolf wood wool worm yard zebra
"""

_ADJECTIVES = """
amber ancient bitter bold bright broad calm clever cold crisp dark deep dry early eager fair faint fancy
firm gentle grand green happy heavy hollow humble icy kind large late lively lonely loud lucky mellow mild
modest narrow noble odd old pale plain polite proud quick quiet rapid rare red rough round royal rusty
sharp shy silent simple sleepy slim slow smooth soft sour steady stiff sweet swift tall tame tender thick
tidy tiny vast warm weary white wide wild wise young
"""

_VERBS = "saw found took left made kept lost drew sold hid held met"
_PLACES = "near under behind beside above before after without"

NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
VERBS: tuple[str, ...] = tuple(_VERBS.split())
PLACES: tuple[str, ...] = tuple(_PLACES.split())

NOISE: tuple[str, ...] = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def noise(count: int) -> list[str]:
    """The repeated sentences that RULER calls noise, `count` of them."""
    return [NOISE[index % len(NOISE)] for index in range(count)]


def sentences(count: int, rng: random.Random) -> list[str]:
    """`count` sentences of plain English made of the task's own nouns: text that never repeats for long."""
    made = []
    for _ in range(count):
        subject, thing, where = rng.choice(NOUNS), rng.choice(NOUNS), rng.choice(NOUNS)
        act = f"The {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)} a {thing}"
        made.append(f"{act} {rng.choice(PLACES)} the {where}.")
    return made
