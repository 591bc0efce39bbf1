def describe():
    return {"device": "fake", "platform": "cpu"}
